"""What torch takes for what bench/gpu_model.cpp times: transformers' forward pass, eager with SDPA; SDPA alone; an MTP step, eager and as a CUDA graph.
usage: gpu_torch.py HF_FOLDER TOKENS_FILE ROUNDS [DEVICE]     bf16; one sequence and its labels a line; prints one JSON object"""
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F


def main():
    folder, tokens, rounds, *device = sys.argv[1:]
    device = torch.device(device[0] if device else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        print(json.dumps({"why": f"torch {torch.__version__} finds no CUDA device"}))
        return
    from transformers import AutoModelForCausalLM, __version__

    cuda = device.type == "cuda"

    def median(work):
        """Seconds by the host's clock until the device is done."""
        taken = []
        for turn in range(-3, int(rounds)):
            start = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize()
            if turn >= 0:
                taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    def by_events(work):
        """Seconds by the device's clock."""
        if not cuda:
            return median(work)
        taken = []
        for turn in range(-2, int(rounds)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            if turn >= 0:
                taken.append(start.elapsed_time(end) / 1e3)
        return statistics.median(taken)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").eval().to(device)
    ids = torch.tensor([[int(word) for word in line.split()] for line in open(tokens)], device=device)
    with torch.no_grad():
        out = {"torch": torch.__version__, "transformers": __version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version() if cuda else None}
        out["forward"] = median(lambda: model(ids[:, :-1], use_cache=False).logits)
        logits = model(ids[:, :-1], use_cache=False).logits
        losses = [F.cross_entropy(row.float(), labels) for row, labels in zip(logits, ids[:, 1:])]
        out["loss"] = torch.stack(losses).mean().item()
        del logits

        c = model.config
        size = c.hidden_size // c.num_attention_heads
        batch, length = ids.shape[0], ids.shape[1] - 1

        def noise(*shape):
            return torch.randn(*shape, device=device, dtype=torch.bfloat16)

        q, k, v = (noise(batch, heads, length, size) for heads in (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads))
        out["sdpa"] = by_events(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))

        class Step:
            """Norms of the token's embedding and of the state, their joint projection, a Llama layer without rotation, a norm."""

            def __init__(self):
                h, f, kv = c.hidden_size, c.intermediate_size, c.num_key_value_heads * size
                shapes = {"join": (h, 2 * h), "q": (h, h), "k": (kv, h), "v": (kv, h), "out": (h, h), "gate": (f, h), "up": (f, h), "down": (h, f)}
                self.w = {name: noise(*shape) * 0.02 for name, shape in shapes.items()}
                self.norms = [noise(h) for _ in range(5)]

            def norm(self, number, x):
                return F.rms_norm(x, (x.shape[-1],), self.norms[number], 1e-5)

            def __call__(self, hidden, tokens):
                w = self.w
                embedded = F.embedding(tokens, model.get_input_embeddings().weight)
                x = F.linear(torch.cat([self.norm(0, embedded), self.norm(1, hidden)], -1), w["join"])
                y = self.norm(2, x)
                q, k, v = (F.linear(y, w[name]).view(1, y.shape[0], -1, size).transpose(1, 2) for name in "qkv")
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).reshape(x.shape)
                x = x + F.linear(y, w["out"])
                y = self.norm(3, x)
                x = x + F.linear(F.silu(F.linear(y, w["gate"])) * F.linear(y, w["up"]), w["down"])
                return self.norm(4, x)

        step = Step()
        out["step"] = {}
        for rows in (1, 8):
            host = torch.randn(rows, c.hidden_size, dtype=torch.bfloat16), torch.arange(rows)
            static = [x.to(device) for x in host]

            def bring():
                for to, x in zip(static, host):
                    to.copy_(x)

            def eager():
                bring()
                return step(*static)

            figures = out["step"][str(rows)] = {"eager": median(eager)}
            if cuda:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step(*static)

                def replay():
                    bring()
                    graph.replay()

                figures["graph"] = median(replay)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
