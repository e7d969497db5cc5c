"""GPT models of the real megatron-core on a machine without a GPU, as any rank of any layout: torch.cuda is answered by stubs, and the
process group is torch's fake one, whose collectives do nothing. With "--te" on the command line layers are those of the Transformer
Engine spec, over a stand-in for that package."""
import os
import sys
import warnings

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

# What building a model asks of a GPU.
CPU = torch.device("cpu")
torch.cuda.current_device = lambda: CPU
torch.cuda.get_device_capability = lambda *ignored: (8, 0)
torch.cuda.get_rng_state = lambda *ignored: torch.get_rng_state()
torch.Tensor.cuda = lambda self, *ignored, **also: self

TRANSFORMER_ENGINE = "--te" in sys.argv
if TRANSFORMER_ENGINE:
    import transformer_engine_stub
    transformer_engine_stub.install()

import megatron.core  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig  # noqa: E402

SAME_NAMES = """num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels add_bias_linear add_qkv_bias qk_layernorm normalization
    softmax_type moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_shared_expert_gate moe_layer_freq moe_router_score_function
    moe_router_enable_expert_bias moe_router_topk q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim mtp_num_layers
    tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size expert_model_parallel_size
    expert_tensor_parallel_size account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split pipeline_model_parallel_layout
    hetereogenous_dist_checkpoint""".split()
OTHER_NAMES = {"num_experts": "num_moe_experts", "decoder_first_pipeline_num_layers": "num_layers_in_first_pipeline_stage",
               "decoder_last_pipeline_num_layers": "num_layers_in_last_pipeline_stage"}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def allow_local_latent_attention():
    """Latent attention passes two arguments that the local spec's attention lacks, and takes Transformer Engine, which is not
    installed, for there. Neither changes a parameter."""
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    plain = DotProductAttention.__init__

    def init(self, *args, k_channels=None, v_channels=None, **more):
        plain(self, *args, **more)

    DotProductAttention.__init__ = init
    multi_latent_attention.HAVE_TE = TRANSFORMER_ENGINE


allow_local_latent_attention()


def config_of(args):
    """What Megatron's core_transformer_config_from_args makes of the arguments used here."""
    given = {name: args[name] for name in SAME_NAMES if args.get(name) is not None}
    given.update({ours: args[name] for name, ours in OTHER_NAMES.items() if args.get(name) is not None})
    given.setdefault("num_query_groups", args["num_query_groups"] if args.get("group_query_attention") else None)
    if args.get("swiglu"):
        given.update(gated_linear_unit=True, activation_func=torch.nn.functional.silu, bias_activation_fusion=False)
    if args.get("num_experts"):
        given.update(moe_router_load_balancing_type="none")
        if args.get("moe_router_enable_expert_bias"):
            given.update(moe_router_bias_update_rate=1e-3)
    dtype = DTYPES[args["params_dtype"]]
    if TRANSFORMER_ENGINE and args.get("num_experts"):
        given.update(moe_grouped_gemm=True)
    given.update(params_dtype=dtype, bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, pipeline_dtype=dtype,
                 use_cpu_initialization=True, perform_initialization=False, gradient_accumulation_fusion=False, persist_layer_norm=False)
    if not args.get("multi_latent_attention"):
        return TransformerConfig(**given)
    return MLATransformerConfig(**{"q_lora_rank": None, **given})  # the argument's default; the class has another


class Rank:
    """This process as one rank of a layout: `with Rank(args, world, rank) as here`, then `here.model(chunk)`."""

    def __init__(self, args, world, rank):
        self.args, self.world, self.rank = args, world, rank

    def __enter__(self):
        args = self.args
        dist.init_process_group(backend="fake", store=FakeStore(), rank=self.rank, world_size=self.world)
        parallel_state.initialize_model_parallel(
            args.get("tensor_model_parallel_size", 1), args.get("pipeline_model_parallel_size", 1), args.get("virtual_pipeline_model_parallel_size"),
            expert_model_parallel_size=args.get("expert_model_parallel_size", 1), expert_tensor_parallel_size=args.get("expert_tensor_parallel_size"),
            create_gloo_process_groups=False)
        tensor_parallel.random.initialize_rng_tracker(force_reset=True)
        return self

    def __exit__(self, *error):
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()

    def place(self):
        """Coordinates under the names that the sample takes."""
        return {"pipeline": parallel_state.get_pipeline_model_parallel_rank(), "tensor": parallel_state.get_tensor_model_parallel_rank(),
                "data": parallel_state.get_data_parallel_rank(with_context_parallel=True)}

    def chunks(self):
        """Numbers of virtual stages; [None] without them."""
        stages = self.args.get("virtual_pipeline_model_parallel_size")
        return range(stages) if stages else [None]

    def model(self, chunk):
        """The model of one virtual stage (None without them), as pretrain_gpt builds and get_model wraps it."""
        args, config = self.args, config_of(self.args)
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=TRANSFORMER_ENGINE, normalization=config.normalization, vp_stage=chunk)
        mtp = None
        if config.mtp_num_layers:
            from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs
            last = get_gpt_decoder_layer_specs(config, use_transformer_engine=TRANSFORMER_ENGINE, normalization=config.normalization, qk_l2_norm=False)[-1]
            mtp = get_gpt_mtp_block_spec(config, last, use_transformer_engine=TRANSFORMER_ENGINE, vp_stage=chunk)
        model = GPTModel(
            config=config, transformer_layer_spec=spec, vocab_size=args["padded_vocab_size"], max_sequence_length=args["max_position_embeddings"],
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
            share_embeddings_and_output_weights=not args.get("untie_embeddings_and_output_weights"),
            position_embedding_type=args.get("position_embedding_type", "learned_absolute"), mtp_block_spec=mtp, vp_stage=chunk)
        return Float16Module(config, model) if config.bf16 or config.fp16 else model


def flatten(state_dict):
    """(tensors, objects) of a sharded state dict whose factories are built: lists of plain dicts."""
    apply_factories(state_dict)
    tensors, objects = [], []

    def walk(name, value):
        if isinstance(value, ShardedTensor):
            assert value.flattened_range is None and value.local_shape == value.data.shape
            tensors.append({
                "name": name, "key": value.key, "dtype": str(value.dtype).removeprefix("torch."), "local_shape": list(value.local_shape),
                "global_shape": list(value.global_shape), "global_offset": list(value.global_offset),
                "axis_fragmentations": list(value.axis_fragmentations), "prepend_axis_num": value.prepend_axis_num,
                "replica_id": list(value.replica_id), "allow_shape_mismatch": value.allow_shape_mismatch})
        elif isinstance(value, ShardedObject):
            objects.append({"name": name, "key": value.key, "global_shape": list(value.global_shape), "global_offset": list(value.global_offset),
                            "replica_id": list(value.replica_id)})
        elif isinstance(value, (list, tuple)):
            for one in value:
                walk(name, one)
        elif isinstance(value, dict):
            for one in value.values():
                walk(name, one)
        else:
            raise TypeError(f"{name}: {type(value)} is no part of a sharded state dict")

    for name, value in state_dict.items():
        walk(name, value)
    return tensors, objects
