"""ModelConfig: the published sizes, its JSON, and its translation from and to a Hugging Face config.json."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from ring_jax import flops
from ring_jax.config import HF_ARCHITECTURE, HF_DEFAULTS, HF_FIELDS, PRESETS, ModelConfig, from_hf, preset, read_hf_config, to_hf
from ring_jax.model import Ring
from tests.ring_jax.models import GOLDEN, SMALL, YARN

EXTENDED = dataclasses.replace(SMALL, rope_scaling=YARN)


def parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    state = nnx.state(nnx.eval_shape(lambda: Ring(config, rngs=nnx.Rngs(0))), nnx.Param)
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("ring-mini-linear-2.0", 16_423_443_456, 956_947_456), ("ring-flash-linear-2.0", 104_181_657_600, 6_156_578_816)],
)
def test_published_counts(name, total, active):
    config = preset(name)
    shapes = parameters(config)
    assert sum(map(math.prod, shapes.values())) == total
    # A token meets all parameters but the tables of tokens and the experts that are not its own.
    experts = [shape for path, shape in shapes.items() if config.num_experts in shape[:-1] and len(shape) == 5]
    idle = sum(math.prod(shape) // config.num_experts * (config.num_experts - config.num_active_experts) for shape in experts)
    assert total - idle - 2 * config.vocab_size * config.hidden_size == active
    assert (flops.num_params(config), flops.num_active_params(config)) == (total, active)


@pytest.mark.parametrize(
    "config",
    [
        PRESETS["demo"],
        SMALL,
        dataclasses.replace(SMALL, tie_embeddings=True),
        dataclasses.replace(SMALL, num_mtp_layers=2),
        dataclasses.replace(SMALL, num_shared_experts=0),
        dataclasses.replace(SMALL, num_dense_layers=4),
    ],
)
def test_counts_of_other_models(config):
    assert flops.num_params(config) == sum(map(math.prod, parameters(config).values()))


def test_flops():
    config = SMALL
    matrices = 6 * (flops.num_active_params(config) + config.vocab_size * config.hidden_size)
    per_head = config.num_heads * config.head_size
    linear = 2 * 14 * per_head * (config.chunk_size + config.head_size)
    assert flops.training_flops_per_token(config, 1000) == matrices + linear + 2 * 6 * per_head * 1000


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = preset(name)
    assert ModelConfig.from_json(config.to_json()) == config
    # A config.json holds all of a model but how its weights begin.
    assert dataclasses.replace(from_hf(json.loads(json.dumps(to_hf(config)))), init_scale=config.init_scale) == config


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown model preset 'ring-maxi'") as error:
        preset("ring-maxi")
    assert all(name in str(error.value) for name in PRESETS)


def test_released_presets_stop_at_both_tokens():
    for name in ("ring-mini-linear-2.0", "ring-flash-linear-2.0"):
        assert preset(name).stop_tokens == (156892, 156895)
        assert preset(name).pad_token == 156892


def test_yarn_round_trips():
    assert ModelConfig.from_json(EXTENDED.to_json()) == EXTENDED
    assert dataclasses.replace(from_hf(json.loads(json.dumps(to_hf(EXTENDED)))), init_scale=EXTENDED.init_scale) == EXTENDED
    assert EXTENDED.num_positions == 2048
    assert hash(EXTENDED) == hash(ModelConfig.from_json(EXTENDED.to_json()))
    # Whatever the file calls the extended length, the original one counts.
    assert dataclasses.replace(EXTENDED, max_positions=2048).num_positions == 2048
    without = tuple(pair for pair in YARN if pair[0] != "original_max_position_embeddings")
    assert dataclasses.replace(EXTENDED, rope_scaling=without).num_positions == 2048
    assert from_hf(to_hf(SMALL) | {"rope_scaling": {"rope_type": "default"}}).rope_scaling is None


def test_golden_configs():
    periodic, trailing = (read_hf_config(GOLDEN / name) for name in ("periodic", "trailing"))
    assert (periodic.num_layers, periodic.period, periodic.num_heads, periodic.num_kv_heads, periodic.head_size) == (10, 5, 4, 2, 8)
    assert (periodic.num_norm_groups, periodic.num_expert_groups, periodic.num_active_expert_groups) == (2, 4, 2)
    assert (trailing.num_heads, trailing.num_dense_layers, trailing.num_layers, trailing.period) == (6, 2, 7, 4)
    assert periodic.stop_tokens == (1,)


@pytest.mark.parametrize(
    ("stated", "generation", "stops"),
    [
        (7, None, (7,)),
        ([7, 9], None, (7, 9)),
        (7, {"eos_token_id": [7, 9]}, (7, 9)),
        (7, {"eos_token_id": 9}, (9,)),
        ([7], {}, (7,)),
        (None, None, ()),
    ],
)
def test_stop_tokens(stated, generation, stops):
    assert from_hf(to_hf(SMALL) | {"eos_token_id": stated}, generation).stop_tokens == stops


def test_read_hf_config(tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(to_hf(SMALL)))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert read_hf_config(tmp_path).stop_tokens == (7, 9)
    for text in ("[]", '"config"'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            read_hf_config(tmp_path)


def test_another_family():
    with pytest.raises(ValueError, match="model_type 'llama' .*LlamaForCausalLM.* is not 'bailing_moe_linear'"):
        from_hf({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    with pytest.raises(ValueError, match="is not 'bailing_moe_linear'"):
        from_hf({})
    assert from_hf(to_hf(SMALL) | {"model_type": "bailing_moe_v2", "architectures": [HF_ARCHITECTURE]}).num_layers == SMALL.num_layers


def test_all_problems_at_once():
    scaling = {"type": "linear", "mscale": 2}
    with pytest.raises(ValueError, match=r"config\.json") as error:
        from_hf({"model_type": "bailing_moe_linear", "hidden_act": "gelu", "use_qkv_bias": True, "rope_scaling": scaling})
    missing = [theirs for theirs in HF_FIELDS.values() if theirs not in HF_DEFAULTS]
    assert len(missing) > 10
    for name in missing:
        assert f"no {name}" in str(error.value)
    for setting in (
        "hidden_act is 'gelu', not 'silu'",
        "use_qkv_bias is True, not False",
        "rope_scaling 'linear', not 'yarn'",
        "with mscale",
    ):
        assert setting in str(error.value)


def test_what_a_config_may_leave_out():
    fields = {name: value for name, value in to_hf(SMALL).items() if name not in HF_DEFAULTS}
    del fields["head_dim"], fields["moe_shared_expert_intermediate_size"], fields["pad_token_id"]
    config = from_hf(fields | {"hidden_size": 48, "num_shared_experts": 2})
    assert (config.head_size, config.shared_expert_size, config.pad_token) == (8, 2 * SMALL.expert_size, 0)
    assert (config.num_dense_layers, config.num_expert_groups, config.partial_rotary_factor) == (0, 1, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 96}, "chunk_size must be one of 16, 32, 64, 128, not 96"),
        ({"chunk_size": 8}, "chunk_size must be one of 16, 32, 64, 128, not 8"),
        ({"num_kv_heads": 4}, "num_kv_heads 4 must divide num_heads 6"),
        ({"num_norm_groups": 5}, "num_norm_groups 5 must divide 6 x 8 channels"),
        ({"num_expert_groups": 3}, "num_expert_groups 3 must divide num_experts 8"),
        ({"num_active_experts": 5}, "num_active_experts 5 is more than the 4 experts"),
        ({"partial_rotary_factor": 0.4}, "odd rotary size 3"),
        ({"period": 0}, "period"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_active_expert_groups": 5}, "num_active_expert_groups 5"),
        ({"num_dense_layers": -1}, "num_dense_layers must be a whole number of at least 0, not -1"),
        ({"hidden_size": "24"}, "hidden_size must be a whole number of at least 1, not '24'"),
        ({"rope_scaling": (("rope_type", "yarn"),)}, "factor"),
        ({"rope_scaling": (("factor", 0.5), ("rope_type", "yarn"))}, "factor .* not 0.5"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_json_of_another_version():
    fields = json.loads(SMALL.to_json())
    with pytest.raises(ValueError, match="unknown model config fields: colour, taste"):
        ModelConfig.from_json(json.dumps(fields | {"taste": 1, "colour": 2}))
    del fields["num_heads"], fields["vocab_size"]
    with pytest.raises(ValueError, match="vocab_size, num_heads"):
        ModelConfig.from_json(json.dumps(fields))


def test_layer_kinds():
    flash = preset("ring-flash-linear-2.0")
    assert [i for i in range(flash.num_layers) if flash.mixer(i) == "softmax"] == [7, 15, 23, 31]
    mini = preset("ring-mini-linear-2.0")
    assert [i for i in range(mini.num_layers) if mini.mixer(i) == "softmax"] == [4, 9, 14, 19]
    assert [mini.ffn(i) for i in range(3)] == ["dense", "moe", "moe"]
    np.testing.assert_array_equal([dataclasses.replace(mini, num_layers=3).mixer(i) for i in range(3)], "softmax")
