"""Sharded state dicts of every rank and virtual stage, key by key and field by field, against what the real megatron-core computes for
the same arguments with its local layer spec; with "--te", with the Transformer Engine spec over a stand-in for that package."""
import importlib.util
import json
import pathlib
import subprocess
import sys
import unittest

from peers_python import need, skip

need("torch and megatron-core")
if not all(importlib.util.find_spec(one) for one in ("torch", "megatron")):
    skip(f"{sys.executable} has no torch or no megatron-core")

from support import SHARDKIT  # noqa: E402
import megatron_cpu  # noqa: E402

SPEC = "transformer_engine" if megatron_cpu.TRANSFORMER_ENGINE else "local"
SAMPLE = pathlib.Path(SHARDKIT).parent / "sharded_state_dict"

GPT = dict(num_layers=4, hidden_size=32, ffn_hidden_size=96, num_attention_heads=8, max_position_embeddings=24, padded_vocab_size=128,
           normalization="LayerNorm", add_bias_linear=True, position_embedding_type="learned_absolute", params_dtype="bfloat16")
LLAMA = dict(GPT, normalization="RMSNorm", add_bias_linear=False, swiglu=True, position_embedding_type="rope", group_query_attention=True,
             num_query_groups=4)
QWEN3 = dict(LLAMA, qk_layernorm=True, kv_channels=12, num_query_groups=2)
MOE = dict(LLAMA, num_experts=4, moe_ffn_hidden_size=40, moe_router_topk=2)
SIGMOID = dict(MOE, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_shared_expert_intermediate_size=48,
               moe_layer_freq=[0, 1, 1, 1])
MLA = dict(SIGMOID, multi_latent_attention=True, qk_layernorm=True, q_lora_rank=16, kv_lora_rank=24, qk_head_dim=8, qk_pos_emb_head_dim=4,
           v_head_dim=6, group_query_attention=False, num_query_groups=None)
UNTIED = dict(untie_embeddings_and_output_weights=True)

MODELS = {
    "gpt tied": GPT,
    "gpt untied": dict(GPT, **UNTIED),
    "gpt f32, no bias, qkv bias": dict(GPT, params_dtype="float32", add_bias_linear=False, add_qkv_bias=True),
    "gpt, sinks": dict(GPT, softmax_type="learnable", params_dtype="float16"),
    "gpt, qk norm with bias": dict(GPT, qk_layernorm=True),
    "llama tied": LLAMA,
    "llama untied": dict(LLAMA, **UNTIED),
    "qwen2": dict(LLAMA, add_qkv_bias=True, **UNTIED),
    "qwen3": dict(QWEN3, **UNTIED),
    "qwen3 tied": QWEN3,
    "llama, layers by number": dict(LLAMA, hetereogenous_dist_checkpoint=True),
    "moe softmax": dict(MOE, **UNTIED),
    "moe softmax tied": MOE,
    "moe with biases": dict(MOE, add_bias_linear=True, normalization="LayerNorm", expert_tensor_parallel_size=1),
    "moe ungated": dict(MOE, swiglu=False),
    "moe every second": dict(MOE, moe_layer_freq=2),
    "moe sigmoid, shared": dict(SIGMOID, **UNTIED),
    "moe shared with a gate": dict(SIGMOID, moe_shared_expert_gate=True, moe_layer_freq=1),
    "mla": dict(MLA, **UNTIED),
    "mla stacked": dict(MLA, moe_layer_freq=1),
    "mla dense, no q lora": dict(MLA, q_lora_rank=None, num_experts=None, moe_ffn_hidden_size=None, moe_layer_freq=None, moe_shared_expert_intermediate_size=None,
                                 moe_router_enable_expert_bias=None, moe_router_score_function=None),
    "mla, no norms": dict(MLA, qk_layernorm=False),
    "mla, norms with bias": dict(MLA, normalization="LayerNorm"),
    "mtp1": dict(LLAMA, mtp_num_layers=1, **UNTIED),
    "mtp1 tied": dict(LLAMA, mtp_num_layers=1),
    "mtp2": dict(QWEN3, mtp_num_layers=2, **UNTIED),
    "mtp2 tied": dict(QWEN3, mtp_num_layers=2),
    "mtp1 with sinks": dict(QWEN3, mtp_num_layers=1, softmax_type="learnable"),
    "mtp1 of experts": dict(MLA, mtp_num_layers=1, **UNTIED),
    "mtp1, moe stacked": dict(MOE, mtp_num_layers=1, **UNTIED),
    "mtp1, learned positions": dict(GPT, mtp_num_layers=1, **UNTIED),
}


def layout(tp, pp=1, vpp=None, ep=1, **more):
    return dict(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp,
                expert_model_parallel_size=ep, **more)


LAYOUTS = {
    "tp1": layout(1), "tp2": layout(2), "tp4": layout(4), "pp2": layout(1, 2), "tp2 pp2": layout(2, 2), "tp4 pp2": layout(4, 2),
    "pp2 vpp2": layout(1, 2, 2), "tp2 pp2 vpp2": layout(2, 2, 2), "pp4": layout(1, 4),
    "pp2 uneven": layout(1, 2, decoder_first_pipeline_num_layers=1), "tp2 pp2 uneven": layout(2, 2, decoder_last_pipeline_num_layers=1),
    "pp3 counting both ends": layout(1, 3, account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True),
}
EXPERT_LAYOUTS = {
    "ep2": layout(1, ep=2), "tp2 ep2": layout(2, ep=2), "tp2 ep2 etp1": layout(2, ep=2, expert_tensor_parallel_size=1),
    "tp4 ep2 etp2": layout(4, ep=2, expert_tensor_parallel_size=2), "tp2 pp2 vpp2 ep2": layout(2, 2, 2, 2), "tp4 ep4 etp1": layout(4, ep=4, expert_tensor_parallel_size=1),
}
STAGE_TEXTS = ("Ett|tt{m}L", "Et|ttt{m}L", "Et|t|t|t{m}L", "E|tt|tt|{m}L")  # pipeline_model_parallel_layout; {m}: MTP layers
METADATA = ({}, {"non_homogeneous_layers": True}, {"singleton_local_shards": True})


class Ours:
    """The sample, asked a line at a time."""

    def __init__(self):
        self.process = subprocess.Popen([SAMPLE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert "error" not in answer, answer
        return answer

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def drop_unused_head(model):
    """Megatron allocates an output weight on a last stage that has tied weights and MTP, and then asserts that there is none; without
    it sharded_state_dict() gives what its comments say."""
    module = getattr(model, "module", model)
    with_bug = module.share_embeddings_and_output_weights and module.post_process and module.mtp_process and not module.pre_process
    if with_bug:
        module.output_layer.weight = None
    return with_bug


class ShardedStateDicts(unittest.TestCase):
    longMessage = False
    maxDiff = 4000
    counts = {"state dicts": 0, "tensors": 0, "objects": 0, "after dropping a head that Megatron refuses": 0}

    @classmethod
    def setUpClass(cls):
        cls.ours = Ours()

    @classmethod
    def tearDownClass(cls):
        cls.ours.close()
        print("compared:", ", ".join(f"{count} {what}" for what, count in cls.counts.items()))

    def compare(self, what, args, metadata, place, chunk, theirs):
        ours = self.ours.ask(args=args, rank=dict(place, chunk=chunk or 0), metadata=metadata, spec=SPEC)
        for kind, expected in zip(("tensors", "objects"), theirs):
            # One name stands for both halves of a gated fc1: the key and the offset tell them apart.
            order = lambda one: (one["name"], one["key"], one["global_offset"])  # noqa: E731
            a, b = sorted(ours[kind], key=order), sorted(expected, key=order)
            names_a, names_b = [order(one) for one in a], [order(one) for one in b]
            self.assertEqual(names_a, names_b, f"{what}: only ours {[n for n in names_a if n not in names_b][:4]}, only Megatron's {[n for n in names_b if n not in names_a][:4]}")
            for x, y in zip(a, b):
                self.assertEqual(x, y, f"{what}: ours {x}, Megatron's {y}")
            self.counts[kind] += len(b)
        self.counts["state dicts"] += 1

    def every_rank(self, what, args, metadata):
        data = 2
        world = args["tensor_model_parallel_size"] * args["pipeline_model_parallel_size"] * data
        for rank in range(world):
            with megatron_cpu.Rank(args, world, rank) as here:
                for chunk in here.chunks():
                    model = here.model(chunk)
                    label = f"{what}, {metadata}, rank {rank}, chunk {chunk}"
                    try:
                        if drop_unused_head(model):
                            self.counts["after dropping a head that Megatron refuses"] += 1
                        theirs = megatron_cpu.flatten(model.sharded_state_dict(metadata=dict(metadata)))
                    except AssertionError as refused:
                        self.fail(f"{label}: Megatron refuses: {refused!r}")
                    self.compare(label, args, metadata, here.place(), chunk, theirs)

    def test_layouts(self):
        for name, model in MODELS.items():
            for at, sizes in (LAYOUTS | (EXPERT_LAYOUTS if model.get("num_experts") else {})).items():
                with self.subTest(f"{name}, {at}"):
                    self.every_rank(f"{name}, {at}", sizes | model, {})

    def test_metadata(self):
        for name in ("gpt tied", "llama untied", "moe softmax", "moe with biases", "mla stacked", "mtp2 tied", "mtp1 of experts"):
            experts = MODELS[name].get("num_experts")
            for metadata in METADATA[1:]:
                with self.subTest(f"{name}, {metadata}"):
                    self.every_rank(name, dict(MODELS[name], **layout(2, 2, 2, 2 if experts else 1)), metadata)

    def test_stage_texts(self):
        for name in ("gpt tied", "llama untied", "moe softmax", "mtp1", "mtp2 tied"):
            depths = MODELS[name].get("mtp_num_layers") or 0
            for text in STAGE_TEXTS:
                stages = text.replace("{m}", "m" * depths)
                vpp = (stages.count("|") + 1) // 2
                with self.subTest(f"{name}, {stages}"):
                    self.every_rank(f"{name}, {stages}", dict(MODELS[name], **layout(1, 2, vpp if vpp > 1 else None, pipeline_model_parallel_layout=stages)), {})

    def test_the_comparison_sees_another_rank(self):
        args = dict(MODELS["moe softmax"], **layout(2, ep=2))
        with megatron_cpu.Rank(args, 4, 3) as here:
            theirs = megatron_cpu.flatten(here.model(None).sharded_state_dict(metadata={}))
            for name in ("tensor", "data"):
                with self.assertRaises(AssertionError):
                    self.compare(name, args, {}, dict(here.place(), **{name: 0}), None, theirs)

    def test_tied_head_of_an_mtp_stage_fails_megatrons_own_assertion(self):
        args = dict(MODELS["mtp1 tied"], **layout(1, 2))
        with megatron_cpu.Rank(args, 2, 1) as here:
            with self.assertRaises(AssertionError):
                here.model(None).sharded_state_dict(metadata={})


if __name__ == "__main__":
    unittest.main(argv=[one for one in sys.argv if one != "--te"])
