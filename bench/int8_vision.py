"""What 8-bit linear layers save in the vision tower of SmolVLM2-256M on a CPU: the time of one frame in float32 and in 8 bits.

    python bench/int8_vision.py [--repeats 7] [--threads 1 2] [--json FILE]

The tower has the published shape and random weights; one frame of 512×512 pixels goes through tower and connector, on one thread and,
where there are two cores, on two. Both forms take turns, so that both meet the same load of the machine; the ratio is of the medians, and
its spread is that of the turns. Both run with the library's faster attention ('sdpa' or 'eager', tried first). The ratio of the CPU time
is told as well: on one thread other processes disturb it less. Two threads on a busy machine wait for each other, and say little.
"""
import argparse, copy, json, os, time
from statistics import median

import torch
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from dst_smolvlm.core.config import atomic_write, environment, run_cli
from dst_smolvlm.model.configuration import published_config
from dst_smolvlm.model.quantization import quantize_vision, token_error

def tower() -> SmolVLMForConditionalGeneration:
    "SmolVLM2-256M by its published shape, all of its vision tower and next to nothing of its language model."
    torch.manual_seed(0)
    text = dict(model_type='llama', vocab_size=64, hidden_size=576, intermediate_size=32, num_hidden_layers=1, num_attention_heads=9)
    config = SmolVLMConfig(text_config=text, vision_config=published_config('256M').vision_config.to_dict(), scale_factor=4, pad_token_id=0)
    return SmolVLMForConditionalGeneration(config).eval()

def look(model, pixels) -> torch.Tensor:
    "Image tokens [1, 64, 576] of a frame."
    return model.model.connector(model.model.vision_model(pixels).last_hidden_state)

def seconds(model, pixels) -> tuple[float, float]:
    "Wall and CPU seconds of a frame."
    begin = time.perf_counter(), time.process_time()
    look(model, pixels)
    return time.perf_counter() - begin[0], time.process_time() - begin[1]

def fastest_attention(model, pixels) -> str:
    "The attention implementation with which the model is left: the faster in the better of two turns."
    taken = {}
    for name in ('sdpa', 'eager'):
        model.set_attn_implementation(dict(vision_config=name))
        look(model, pixels)
        taken[name] = min(seconds(model, pixels)[1] for _ in range(2))
    best = min(taken, key=taken.get)
    model.set_attn_implementation(dict(vision_config=best))
    return best

@torch.no_grad()
def rows(repeats:int=7, threads_of=(1, 2)) -> list[dict]:
    "One row per number of threads; `ratio` is float32 time over 8-bit time, by the median of `repeats` turns."
    kept, found, pixels = torch.get_num_threads(), [], torch.rand(1, 3, 512, 512)*2 - 1
    exact = tower()
    quick = quantize_vision(copy.deepcopy(exact))
    try:
        for threads in [n for n in threads_of if n <= os.cpu_count()] or [1]:
            torch.set_num_threads(threads)
            best = fastest_attention(exact, pixels)
            quick.set_attn_implementation(dict(vision_config=best))
            look(quick, pixels)
            pairs = [(seconds(exact, pixels), seconds(quick, pixels)) for _ in range(repeats)]
            wall, cpu = ([(a[i], b[i]) for a, b in pairs] for i in (0, 1))
            each = sorted(a/b for a, b in wall)
            relative, cosine = token_error(look(exact, pixels), look(quick, pixels))
            ratio = lambda taken: median(a for a, _ in taken)/median(b for _, b in taken)
            name = 'int8_vision_256M' + ('' if threads == 1 else f'_{threads}_threads')
            found.append(dict(name=name, ratio=ratio(wall), cpu_ratio=ratio(cpu), ratio_least=each[0],
                              ratio_most=each[-1], fp32_ms=1e3*median(a for a, _ in wall),
                              int8_ms=1e3*median(b for _, b in wall), attention=best, threads=threads, repeats=repeats,
                              cpu_capability=torch.backends.cpu.get_cpu_capability(), relative_error=relative, worst_cosine=cosine))
    finally: torch.set_num_threads(kept)
    return found

@run_cli
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--threads', type=int, nargs='+', default=[1, 2])
    parser.add_argument('--json')
    args = parser.parse_args(argv)
    if min(args.repeats, *args.threads) < 1: parser.error('--repeats, --threads: at least 1')
    found = rows(args.repeats, args.threads)
    print(f"PyTorch {torch.__version__}, {found[0]['cpu_capability']}, median of {args.repeats} turns\n")
    print('| what | threads | float32 / 8 bits | least … most | by CPU time | float32, 8 bits | attention | relative error |\n|' + '---|'*8)
    for r in found:
        print(f"| {r['name']} | {r['threads']} | {r['ratio']:.2f} | {r['ratio_least']:.2f} … {r['ratio_most']:.2f} | {r['cpu_ratio']:.2f} "
              f"| {r['fp32_ms']:.0f} ms, {r['int8_ms']:.0f} ms | {r['attention']} | {r['relative_error']:.4f} |")
    if args.json:
        with atomic_write(args.json) as f: json.dump(dict(rows=found, **environment()), f, indent=1)

if __name__ == '__main__': main()
