"What was written down for an earlier version still runs: keys, values and configurations by their old names."
import pytest
from omegaconf import OmegaConf

from dst_smolvlm.core.config import RENAMED, RENAMED_VALUES, compose_config, renamed_config
from dst_smolvlm.streaming.context_strategies import make_strategy
from dst_smolvlm.training.arguments import training_arguments

OLD = {
    'train.w_lm=2': ('train.lm_loss_weight', 2), 'train.w_speak=3': ('train.speaking_loss_weight', 3),
    'train.w_update=3': ('train.dst_update_loss_weight', 3), 'train.w_state=4': ('train.dst_state_loss_weight', 4),
    'train.w_pointer=.5': ('train.pointer_loss_weight', .5), 'train.surprise_weight=7': ('train.changed_weight', 7),
    'train.glimpse_weight=3': ('train.auxiliary_weight', 3), 'train.glimpses=2': ('train.auxiliary_samples', 2),
    'train.corrupt_told=.1': ('train.state_corruption', .1), 'train.corrupt_epochs=3': ('train.state_corruption_epochs', 3),
    'data.glimpse_world.few_colours=.25': ('data.auxiliary_world.few_colours', .25), 'eval.filter=null': ('eval.state_tracker', None),
    'eval.filter.begin=3.': ('eval.state_tracker.begin', 3.), 'eval.refractory_s=2.': ('eval.cooldown_s', 2.),
    'eval.clock=wait': ('eval.clock', 'queue'), 'context_strategy.positions=turn': ('context_strategy.positions', 'rerotate'),
    'context_strategy.positions=rebuild': ('context_strategy.positions', 'recompute')}


def test_every_rename_is_tried():
    keys = {override.partition('=')[0] for override in OLD}
    assert all(any(key == old or key.startswith(f'{old}.') for key in keys) for old in RENAMED)
    assert {f'{key}={value}' for key, values in RENAMED_VALUES.items() for value in values} <= set(OLD)


@pytest.mark.parametrize('override', OLD)
def test_an_old_override(override, capsys):
    key, value = OLD[override]
    known = OmegaConf.select(compose_config(['context_strategy=drop_middle']), key, default='absent') != 'absent'
    sign = '' if known else '+'                                            # a key of the trainer that the configuration does not list
    cfg = compose_config(['context_strategy=drop_middle', sign + override])
    assert OmegaConf.select(cfg, key) == value
    assert f'is written {sign}{key}=' in capsys.readouterr().err


def test_what_is_not_old_is_not_touched(capsys):
    compose_config(['train.seed=1', 'eval.clock=drop'])
    assert capsys.readouterr().err == ''


def test_an_old_configuration_is_the_same_run():
    now = compose_config(['context_strategy=drop_middle', '+train.pointer_loss_weight=.5'])
    back = {new: old for old, new in RENAMED.items()}
    old = OmegaConf.create({})
    for key in ('train.pointer_loss_weight', 'train.speaking_loss_weight', 'eval.state_tracker', 'data.auxiliary_world'):
        OmegaConf.update(old, back[key], OmegaConf.select(now, key))
    old.context_strategy = dict(positions='turn')
    again = renamed_config(old)
    assert again.train.pointer_loss_weight == .5 and again.eval.state_tracker == now.eval.state_tracker
    assert again.data.auxiliary_world == now.data.auxiliary_world and again.context_strategy.positions == 'rerotate'
    assert 'filter' not in again.eval and 'filter' in old.eval, 'the given one stays as it is'


def test_old_values_deep_in_a_table():
    "As in eval.strategies, whose options are the user's own."
    assert make_strategy(dict(name='drop_middle', positions='turn')).positions == 'rerotate'
    assert make_strategy(dict(name='recent_frames', positions='rebuild')).positions == 'recompute'


def test_old_keys_reach_the_trainer(tmp_path):
    cfg = compose_config(['train.w_speak=3', '+train.surprise_weight=7', '+train.use_cpu=true'])
    args = training_arguments(cfg, tmp_path)
    assert (args.speaking_loss_weight, args.changed_weight) == (3, 7)
