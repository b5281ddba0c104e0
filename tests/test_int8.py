"The 8-bit vision tower: how far off it is in its full size, that it touches nothing else, and what it refuses."
import copy

import numpy as np
import pytest
import torch
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from dst_smolvlm.core.config import InputError
from dst_smolvlm.data.pixels import frames_to_pixels
from dst_smolvlm.model.checkpoints import save_model
from dst_smolvlm.model.configuration import published_config
from dst_smolvlm.model.modeling import build_tiny
from dst_smolvlm.model.quantization import Int8Linear, int8_weight, quantize_vision, token_error
from dst_smolvlm.world.toy_world import make_scene, render_frame

@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad(): yield

def frames(size, *at): return frames_to_pixels([render_frame(make_scene(3), i) for i in at], size)

def tiny(): return build_tiny()[0].eval()

def contents(module): return {name: x.clone() for name, x in [*module.named_parameters(), *module.named_buffers()]}

def test_the_whole_256M_tower_is_close():
    torch.manual_seed(0)
    text = dict(model_type='llama', vocab_size=64, hidden_size=576, intermediate_size=32, num_hidden_layers=1, num_attention_heads=9)
    vision = published_config('256M').vision_config.to_dict()
    model = SmolVLMForConditionalGeneration(SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=4, pad_token_id=0)).eval()
    for m in model.model.vision_model.modules():                     # larger than the library's, so that attention is not flat
        if isinstance(m, torch.nn.Linear): torch.nn.init.normal_(m.weight, std=m.in_features**-.5)
    look = lambda: model.model.connector(model.model.vision_model(pixels).last_hidden_state)
    pixels = frames(512, 20)
    exact = look()
    quantize_vision(model)
    relative, cosine = token_error(exact, look())
    assert relative < .05 and cosine > .998, (relative, cosine)
    assert relative > 1e-3                                           # and it is not float32 after all

def test_only_the_tower_changes_byte_for_byte():
    model = tiny()
    whole, linears = contents(model), [n for n, m in model.model.vision_model.named_modules() if type(m) is torch.nn.Linear]
    wanted = {n for n, p in model.named_parameters() if p.requires_grad}
    assert quantize_vision(model) is model
    after = contents(model)
    gone = set(whole) - set(after)
    assert gone == {f'model.vision_model.{n}.{part}' for n in linears for part in ('weight', 'bias')}
    for name, x in after.items(): assert x.dtype == whole[name].dtype and torch.equal(x, whole[name]), name
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n in wanted if 'vision_model' not in n}
    assert {n for n, m in model.named_modules() if isinstance(m, Int8Linear)} == {f'model.vision_model.{n}' for n in linears}

def test_the_weights_that_it_was_made_of_may_change_afterwards():
    model, pixels = tiny(), frames(64, 3)
    biases = [m.bias for m in model.model.vision_model.modules() if type(m) is torch.nn.Linear]
    before = quantize_vision(model).encode_frames(pixels)
    for bias in biases: bias.add_(100)
    assert torch.equal(model.encode_frames(pixels), before)

def test_twice_is_once():
    model, pixels = quantize_vision(tiny()), frames(64, 3)
    once, layers = model.encode_frames(pixels), [id(m) for m in model.modules()]
    quantize_vision(model)
    assert [id(m) for m in model.modules()] == layers and torch.equal(model.encode_frames(pixels), once)

def test_frames_do_not_see_each_other():
    model = quantize_vision(tiny())
    black = torch.zeros(1, 3, 64, 64)
    pixels = torch.cat([frames(64, 3, 17), 50*frames(64, 9), black, black - 1])             # one of them is far too bright
    together = model.encode_frames(pixels)
    for i in range(len(pixels)):
        relative, _ = token_error(together[i], model.encode_frames(pixels[i:i + 1])[0])
        assert relative < 1e-3, i                                     # float32's own noise may move a number to the next level

def test_a_black_frame_is_a_frame():
    exact, quick = tiny(), quantize_vision(tiny())
    for fill in (0., -1.):
        pixels = torch.full((2, 3, 64, 64), fill)
        tokens = quick.encode_frames(pixels)
        assert tokens.shape == exact.encode_frames(pixels).shape and tokens.isfinite().all()
        assert token_error(exact.encode_frames(pixels), tokens)[0] < .05

def test_neither_saved_nor_loaded_into(tmp_path):
    model, layout = build_tiny()
    state = model.state_dict()
    quantize_vision(model)
    for save in (model.state_dict, lambda: model.save_pretrained(tmp_path/'a'), lambda: save_model(model, layout, tmp_path/'b')):
        with pytest.raises(InputError, match='can neither be saved nor be loaded into.*quantize_vision'): save()
    assert not list(tmp_path.rglob('*.safetensors')) and not (tmp_path/'b').exists()
    with pytest.raises(InputError, match='loaded into'): model.load_state_dict(state, strict=False)

def test_an_older_checkpoint_survives_the_refusal(tmp_path):
    model, layout = build_tiny()
    save_model(model, layout, tmp_path/'checkpoint')
    kept = {p.name: p.read_bytes() for p in (tmp_path/'checkpoint').iterdir()}
    with pytest.raises(InputError): save_model(quantize_vision(model), layout, tmp_path/'checkpoint')
    assert {p.name: p.read_bytes() for p in (tmp_path/'checkpoint').iterdir()} == kept

@pytest.mark.parametrize('change', [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.double(), lambda m: m.to('meta')],
                         ids=['bf16', 'fp16', 'fp64', 'meta'])
def test_other_models_are_refused_and_left_alone(change):
    model = change(tiny())
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(InputError, match='vision_model.* is for a model in float32 on a CPU'): quantize_vision(model)
    assert [type(m) for m in model.modules()] == kinds

@pytest.mark.parametrize('other', [torch.nn.Linear(2, 2), torch.nn.ModuleDict(dict(model=torch.nn.Linear(2, 2)))], ids=['plain', 'inner'])
def test_a_model_without_a_tower_is_refused(other):
    with pytest.raises(InputError, match='no model.vision_model'): quantize_vision(other)

def test_a_model_that_is_cast_afterwards_says_so():
    with pytest.raises(InputError, match='was given torch.bfloat16'): quantize_vision(tiny()).bfloat16().encode_frames(frames(64, 3))

def test_the_tower_is_frozen_and_the_rest_learns():
    model, pixels = quantize_vision(tiny()), frames(64, 3)
    with torch.enable_grad():
        model.encode_frames(pixels).sum().backward()
        assert model.model.connector.modality_projection.proj.weight.grad.abs().sum() > 0
        with pytest.raises(InputError, match='has no gradient'): model.encode_frames(pixels.clone().requires_grad_())

def test_a_copy_computes_the_same():
    model, pixels = quantize_vision(tiny()), frames(64, 3)
    assert torch.equal(copy.deepcopy(model).encode_frames(pixels), model.encode_frames(pixels))

@pytest.mark.parametrize('size', [(4, 4), (5, 7), (768, 768), (33, 4304)])
def test_the_integer_product_is_exact_at_its_extremes(size):
    "A CPU without 8-bit dot products cuts the sum of two products at 16 bits: the weights must not allow it."
    out, inner = size
    rng = np.random.default_rng(0)
    for weight in (torch.ones(out, inner), -torch.ones(out, inner), torch.tensor(rng.choice([-1., 1.], size), dtype=torch.float32),
                   torch.tensor(rng.standard_t(2, size), dtype=torch.float32), torch.eye(max(size))[:out, :inner]):
        linear = torch.nn.Linear(inner, out, bias=False)
        linear.weight.copy_(weight)
        whole, scale = int8_weight(weight)
        fast = Int8Linear(linear)
        for q in (torch.full((3, inner), 255, dtype=torch.uint8), torch.tensor(rng.choice([0, 255], (40, inner)), dtype=torch.uint8)):
            exact = (q.long() @ whole.long().T).double()*scale.double()
            assert torch.allclose(fast.product(q).double(), exact, rtol=1e-6, atol=1e-6*exact.abs().max())

def test_layers_of_odd_shapes_and_without_weight():
    torch.manual_seed(0)
    for shape in ((7,), (1, 7), (2, 3, 7), (0, 7)):
        linear, x = torch.nn.Linear(7, 5), torch.randn(shape)
        y = Int8Linear(linear)(x)
        assert y.shape == linear(x).shape and (not y.numel() or token_error(linear(x), y)[0] < .05)
    torch.nn.init.zeros_(linear.weight)
    assert torch.allclose(Int8Linear(linear)(torch.randn(2, 7)), linear.bias.expand(2, -1))

def test_tokens_that_are_no_numbers_stay_so_and_alone():
    linear, x = torch.nn.Linear(64, 8), torch.randn(3, 64)
    right = Int8Linear(linear)(x)
    x[1, 5] = torch.inf
    y = Int8Linear(linear)(x)
    assert not y[1].isfinite().any() and torch.equal(y[[0, 2]], right[[0, 2]])
