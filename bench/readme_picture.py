"""Draws README's picture again: the shipped checkpoint streams an unseen test video.

    python bench/readme_picture.py            # writes nbs/images/demo_timeline.png
"""
from pathlib import Path

from dst_smolvlm.core.config import atomic_write, compose_config
from dst_smolvlm.model.checkpoints import load_pretrained
from dst_smolvlm.streaming.session import load_thresholds, runner_options, stream_record
from dst_smolvlm.viz.timeline_plot import timeline_figure
from dst_smolvlm.world.scenes import load_scenes

root = Path(__file__).parent.parent
VIDEO = 45          # of the test split: seven steps out of their listed order, three white parts, two wrong parts


def draw(out):
    "Stream the video and write its timeline; returns the trace."
    cfg, checkpoint = compose_config(['data=toy']), root/'data'/'checkpoint'
    (model, layout), scene = load_pretrained(checkpoint), load_scenes(cfg.data, 'test')[VIDEO]
    options = runner_options(cfg, model, load_thresholds(cfg, checkpoint))
    trace = stream_record(model.eval(), layout, scene.record, scene.frames(), **options)
    with atomic_write(out, 'wb') as f: timeline_figure(trace, scene.record).savefig(f, format='png', dpi=86, bbox_inches='tight')
    return trace


if __name__ == '__main__': print(len(draw(root/'nbs'/'images'/'demo_timeline.png').spoken), 'replies')
