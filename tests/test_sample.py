"""The committed sample is what its command makes, and its videos show what its records say."""
from pathlib import Path

import numpy as np

from dst_smolvlm.data.frames import read_frames
from dst_smolvlm.data.loading import read_records
from dst_smolvlm.world.replay import build_sample

data = Path(__file__).parent.parent/'data'


def test_command_makes_the_same_sample(tmp_path):
    "The records are equal; another build of the video library may write other bytes, but the same pictures up to its rounding."
    made, kept = build_sample(tmp_path), read_records(data/'toy.jsonl')
    assert made == kept
    for record in kept:
        frames, again = read_frames(data/record.video, record.fps), read_frames(tmp_path/record.video, record.fps)
        assert len(frames) == record.num_frames()
        assert np.abs(frames.astype(int) - again).mean() < 2


def test_sample_is_small():
    assert sum(p.stat().st_size for p in data.glob('*')) < 1_000_000
