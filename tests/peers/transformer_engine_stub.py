"""Stands in for Transformer Engine 2, which needs a GPU to install: modules with its parameters' names and shapes and its extra states,
so that Megatron's own wrappers of them can say what they save. Computes nothing."""
import sys
import types

import torch


def parameter(*shape, dtype):
    return torch.nn.Parameter(torch.empty(*shape, dtype=dtype))


class Module(torch.nn.Module):
    """Every module of Transformer Engine has an extra state, an empty tensor where there is no FP8."""

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        pass


class Linear(Module):
    def __init__(self, in_features, out_features, *, tp_size, bias, parallel_mode, params_dtype, **ignored):
        super().__init__()
        self.in_features, self.out_features, self.use_bias, self.tp_size = in_features, out_features, bias, tp_size
        self.parallel_mode = parallel_mode
        rows = out_features // tp_size if parallel_mode == "column" else out_features
        columns = in_features // tp_size if parallel_mode == "row" else in_features
        self.add(rows, columns, bias, params_dtype)

    def add(self, rows, columns, bias, dtype):
        self.weight = parameter(rows, columns, dtype=dtype)
        self.bias = parameter(rows, dtype=dtype) if bias else torch.empty(0)


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, *, normalization, **more):
        super().__init__(in_features, out_features, **more)
        self.layer_norm_weight = parameter(in_features, dtype=more["params_dtype"])
        self.layer_norm_bias = parameter(in_features, dtype=more["params_dtype"]) if normalization == "LayerNorm" else None


class GroupedLinear(Linear):
    def __init__(self, num_gemms, in_features, out_features, **more):
        self.count = num_gemms
        super().__init__(in_features, out_features, **more)
        self.num_gemms = num_gemms
        self.fp8_meta, self.fp8, self.fp8_calibration = {"fp8_checkpoint": False}, False, False

    def add(self, rows, columns, bias, dtype):
        for i in range(self.count):
            setattr(self, f"weight{i}", parameter(rows, columns, dtype=dtype))
            if bias:
                setattr(self, f"bias{i}", parameter(rows, dtype=dtype))

    def __setattr__(self, name, value):
        if name == "count":  # before torch.nn.Module is there
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)


class DotProductAttention(Module):
    def __init__(self, num_attention_heads, *, tp_size, softmax_type="vanilla", **ignored):
        super().__init__()
        if softmax_type == "learnable":
            self.softmax_offset = parameter(num_attention_heads // tp_size, dtype=torch.float32)


class RMSNorm(Module):
    def __init__(self, hidden_size, *, params_dtype, **ignored):
        super().__init__()
        self.weight = parameter(hidden_size, dtype=params_dtype)


class LayerNorm(RMSNorm):
    def __init__(self, hidden_size, *, params_dtype, **more):
        super().__init__(hidden_size, params_dtype=params_dtype, **more)
        self.bias = parameter(hidden_size, dtype=params_dtype)


def install():
    """Makes `import transformer_engine` find this."""
    def module(name, **contents):
        out = types.ModuleType(name)
        out.__dict__.update(contents, __path__=[])
        sys.modules[name] = out
        return out

    plain = type("Plain", (), {})  # for what Megatron imports and never uses here
    package = "transformer_engine.pytorch."
    parts = {
        "fp8": module(package + "fp8", FP8GlobalStateManager=plain, fp8_autocast=plain),
        "float8_tensor": module(package + "float8_tensor", Float8Tensor=plain),
        "tensor": module(package + "tensor", QuantizedTensor=type("QuantizedTensor", (), {})),
        "router": module(package + "router", fused_compute_score_for_moe_aux_loss=None, fused_moe_aux_loss=None, fused_topk_with_score_function=None),
    }
    pytorch = module("transformer_engine.pytorch", Linear=Linear, LayerNormLinear=LayerNormLinear, GroupedLinear=GroupedLinear,
                     DotProductAttention=DotProductAttention, RMSNorm=RMSNorm, LayerNorm=LayerNorm,
                     distributed=types.SimpleNamespace(CudaRNGStatesTracker=plain),
                     ops=types.SimpleNamespace(Sequential=plain, FusibleOperation=plain), **parts)
    recipe = types.SimpleNamespace(DelayedScaling=plain)
    module("transformer_engine", __version__="2.9.0", pytorch=pytorch, common=types.SimpleNamespace(recipe=recipe))
