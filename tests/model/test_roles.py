"""Roles of tensors: every tensor of every architecture that gguf's constants know, against a hand-checked table.

The table below was reviewed name by name and does not use the patterns. It also holds names that only
llama.cpp's newer table knows, and the oldest form of expert tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gguf import constants
from hypothesis import given
from hypothesis import strategies as st

from apex_quant.model import Role, classify
from tests.helpers.random_models import random_shapes
from tests.helpers.shapes import ARCHITECTURES

# `*` stands for `blk.{bid}.`, `enc:*` for `enc.blk.{bid}.`
EXPECTED = {
    Role.routed_expert: """
        *ffn_down.{xid} *ffn_down_chexps *ffn_down_exps *ffn_gate.{xid} *ffn_gate_chexps *ffn_gate_exps
        *ffn_gate_up_exps *ffn_up.{xid} *ffn_up_chexps *ffn_up_exps
    """,
    Role.shared_expert: """
        *ffn_down_shexp *ffn_gate_shexp *ffn_latent_down *ffn_latent_up *ffn_routed_down *ffn_routed_up
        *ffn_up_shexp
    """,
    Role.dense_ffn: """
        *channel_mix_key *channel_mix_lerp_k *channel_mix_lerp_r *channel_mix_receptance
        *channel_mix_value *ffn *ffn.act *ffn_conv_base *ffn_conv_proj *ffn_down *ffn_gate *ffn_up
        *vis_down *vis_gate *vis_up convnext.{bid}.dw convnext.{bid}.pw1 convnext.{bid}.pw2
        dec:*ffn_down dec:*ffn_gate dec:*ffn_up enc:*ffn_down enc:*ffn_gate enc:*ffn_up
        posnet.{bid}.conv1 posnet.{bid}.conv2
    """,
    Role.attention: """
        *altup_correct_coef *altup_correct_scale *altup_predict_coef *altup_router *attn_compressor_ape
        *attn_compressor_gate *attn_compressor_kv *attn_conv_base *attn_conv_proj *attn_gate *attn_k
        *attn_k_b *attn_kv *attn_kv_a_mqa *attn_kv_b *attn_output *attn_output_a *attn_output_b *attn_q
        *attn_q_a *attn_q_b *attn_qkv *attn_res_score *attn_sinks *attn_v *attn_v_b *ffn_res_score
        *hc_attn_base *hc_attn_down *hc_attn_fn *hc_attn_inject *hc_attn_scale *hc_attn_up *hc_ffn_base
        *hc_ffn_down *hc_ffn_fn *hc_ffn_inject *hc_ffn_scale *hc_ffn_up *indexer.attn_k
        *indexer.attn_q_b *indexer.k_proj *indexer.proj *indexer.q_proj *indexer_compressor_ape
        *indexer_compressor_gate *indexer_compressor_kv *laurel_l *laurel_r *vis_attn_output
        *vis_attn_qkv dec:*attn_k dec:*attn_o dec:*attn_q dec:*attn_rel_b dec:*attn_v dec:*cross_attn_k
        dec:*cross_attn_o dec:*cross_attn_q dec:*cross_attn_rel_b dec:*cross_attn_v enc:*attn_k
        enc:*attn_o enc:*attn_q enc:*attn_rel_b enc:*attn_v posnet.{bid}.attn_k posnet.{bid}.attn_output
        posnet.{bid}.attn_q posnet.{bid}.attn_v
    """,
    Role.ssm: """
        *shortconv.conv *shortconv.in_proj *shortconv.out_proj *ssm_a *ssm_alpha *ssm_ba *ssm_beta
        *ssm_conv1d *ssm_conv1d_k *ssm_conv1d_q *ssm_conv1d_v *ssm_d *ssm_dt *ssm_f_a *ssm_f_b *ssm_g
        *ssm_g_a *ssm_g_b *ssm_in *ssm_out *ssm_x *time_mix_a0 *time_mix_a1 *time_mix_a2 *time_mix_decay
        *time_mix_decay_w1 *time_mix_decay_w2 *time_mix_first *time_mix_g1 *time_mix_g2 *time_mix_gate
        *time_mix_k_a *time_mix_k_k *time_mix_key *time_mix_lerp_fused *time_mix_lerp_g *time_mix_lerp_k
        *time_mix_lerp_r *time_mix_lerp_v *time_mix_lerp_w *time_mix_lerp_x *time_mix_output
        *time_mix_r_k *time_mix_receptance *time_mix_v0 *time_mix_v1 *time_mix_v2 *time_mix_value
        *time_mix_w0 *time_mix_w1 *time_mix_w2
    """,
    Role.router: """
        *exp_probs_b *exp_probs_b_vl *ffn_gate_inp *ffn_gate_inp_shexp *ffn_gate_tid2eid
    """,
    Role.norm: """
        *altup_router_norm *attn_compressor_norm *attn_k_norm *attn_kv_a_norm *attn_norm *attn_norm_2
        *attn_output_norm *attn_q_a_norm *attn_q_norm *attn_sub_norm *ffn_norm *ffn_norm_exps
        *ffn_routed_norm *ffn_sub_norm *hc_attn_norm *hc_ffn_norm *indexer.k_norm *indexer.q_norm
        *indexer_compressor_norm *laurel_post_norm *layer_output_norm *layer_output_scale *ple_norm_conv
        *ple_norm_key *ple_norm_query *post_attention_norm *post_ffw_norm *post_ffw_norm_1
        *post_ffw_norm_2 *post_norm *pre_ffw_norm_2 *ssm_b_norm *ssm_c_norm *ssm_dt_norm *ssm_norm
        *time_mix_ln cls.norm convnext.{bid}.gamma convnext.{bid}.norm dec.output_norm dec:*attn_norm
        dec:*cross_attn_norm dec:*ffn_norm enc.output_norm enc:*attn_norm enc:*ffn_norm output_hc_norm
        output_norm per_layer_proj_norm posnet.{bid}.attn_norm posnet.{bid}.norm posnet.{bid}.norm1
        posnet.{bid}.norm2 token_embd_norm
    """,
    Role.embedding: """
        *inp_gate *ple_conv1d *ple_key *ple_value *proj altup_proj conv1d hrm.z_l_init
        masked_embd_centroids masked_embd_ordering per_layer_model_proj per_layer_token_embd
        position_embd token_embd token_types
    """,
    Role.output: """
        altup_unembd_proj cls cls.output dense_2 dense_3 output output_hc_base output_hc_down
        output_hc_fn output_hc_scale output_hc_up output_res_score
    """,
    Role.nextn: """
        *nextn.eh_proj *nextn.embed_tokens *nextn.enorm *nextn.hnorm *nextn.shared_head_head
        *nextn.shared_head_norm conf_proj d2t fc markov_w1 markov_w2 nextn.post_projection
        nextn.pre_projection selector_hidden selector_predecessor selector_successor
    """,
    Role.other: """
        *attn_rot_embd rope_factors_long rope_factors_short rope_freqs
    """,
}

OTHER = {
    "rope_freqs": "frequency factors, a constant F32 vector",
    "rope_factors_long": "frequency factors, a constant F32 vector",
    "rope_factors_short": "frequency factors, a constant F32 vector",
    "blk.{bid}.attn_rot_embd": "inverse frequencies of the oldest llama files, a constant F32 vector",
}


def _full(short: str) -> str:
    return short.replace("enc:*", "enc.blk.{bid}.").replace("dec:*", "dec.blk.{bid}.").replace("*", "blk.{bid}.")


ROLE_OF = {_full(name): role for role, names in EXPECTED.items() for name in names.split()}


def known_tensors() -> Iterator[tuple[str, str]]:
    for arch, tensors in constants.MODEL_TENSORS.items():
        for tensor in tensors:
            yield constants.MODEL_ARCH_NAMES[arch], constants.TENSOR_NAMES[tensor]


def test_every_tensor_of_every_architecture_has_its_role() -> None:
    wrong, count = [], 0
    for architecture, template in known_tensors():
        # names that a later gguf adds need no row here, but a role
        expected = Role.projector if architecture == "clip" else ROLE_OF.get(template)
        for suffix in (".weight", ".bias", ".scale", ""):
            found = classify(template.format(bid=7, xid=1) + suffix, (256, 256), architecture)
            count += 1
            if (found.role is Role.other and template not in OTHER) or expected not in (None, found.role):
                wrong.append((architecture, template + suffix, found.role, expected))
    assert not wrong
    assert count > 4 * 2000


def test_only_the_listed_constants_are_other() -> None:
    assert {name for name, role in ROLE_OF.items() if role is Role.other} == set(OTHER)


def test_role_and_layer_by_name() -> None:
    for template, role in ROLE_OF.items():
        found = classify(template.format(bid=7, xid=1) + ".weight", (256, 256, 6), "an unknown architecture")
        assert (found.role, found.layer) == (role, 7 if ".{bid}." in template else None), template


def test_projector_tensors_are_recognized_in_any_file() -> None:
    names = [name for architecture, name in known_tensors() if architecture == "clip"]
    assert len(names) > 150
    for name in names:
        found = classify(name.format(bid=7, xid=1) + ".weight", (64, 64), "gemma4")
        assert (found.role, found.layer) == (Role.projector, None), name


@pytest.mark.parametrize(
    ("name", "shape", "part", "fused", "expert_axis"),
    [
        ("blk.3.ffn_gate_up_exps.weight", (256, 512, 6), "ffn_gate_up", True, 2),
        ("blk.3.ffn_down_exps.weight", (256, 256, 6), "ffn_down", False, 2),
        ("blk.3.ffn_down_exps.bias", (256, 6), "ffn_down", False, 1),
        ("blk.3.ffn_down_exps.scale", (6,), "ffn_down", False, 0),
        ("blk.3.ffn_up_chexps.weight", (256, 256, 6), "ffn_up", False, 2),
        ("blk.3.ffn_up.11.weight", (256, 256), "ffn_up", False, None),
        ("blk.3.ffn_up_shexp.weight", (256, 256), "ffn_up", False, None),
        ("blk.3.ffn_latent_up.weight", (256, 256), "ffn_latent_up", False, None),
        ("blk.3.attn_k_b.weight", (128, 512, 16), "attn_k_b", False, None),
        ("blk.3.ffn_gate_inp_shexp.weight", (256,), "ffn_gate_inp_shexp", False, None),
        ("blk.3.ssm_a", (32,), "ssm_a", False, None),
        ("blk.3.attn_q.weight.lora_a", (256, 8), "attn_q", False, None),
        ("token_embd.weight", (256, 1000), "token_embd", False, None),
    ],
)
def test_part_and_expert_axis(
    name: str, shape: tuple[int, ...], part: str, fused: bool, expert_axis: int | None
) -> None:
    found = classify(name, shape, "qwen35moe")
    assert (found.part, found.fused, found.expert_axis) == (part, fused, expert_axis)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_expert_axis_has_the_experts(architecture: str) -> None:
    # 7 experts: no other dimension of the small shapes
    dense = architecture == "llama"
    shapes = random_shapes(architecture) if dense else random_shapes(architecture, experts=7)
    for name, shape in shapes.items():
        found = classify(name, shape, architecture)
        if found.role is Role.routed_expert:
            assert found.expert_axis is not None
            assert shape[found.expert_axis] == 7
        else:
            assert found.expert_axis is None
            assert 7 not in shape or found.role in (Role.router, Role.embedding), name


def test_nextn_blocks_are_marked_beyond_the_trunk() -> None:
    attention = classify("blk.46.attn_q.weight", (256, 256), "glm4moe", trunk_layers=46)
    assert (attention.role, attention.nextn) == (Role.attention, True)
    assert not classify("blk.45.attn_q.weight", (256, 256), "glm4moe", trunk_layers=46).nextn
    glue = classify("blk.46.nextn.eh_proj.weight", (512, 256), "glm4moe")
    assert (glue.role, glue.nextn, glue.layer) == (Role.nextn, True, 46)
    assert not classify("token_embd.weight", (256, 256), "glm4moe", trunk_layers=46).nextn


@given(st.text(max_size=80), st.lists(st.integers(1, 1 << 40), max_size=4), st.text(max_size=20))
def test_any_name_is_classified(name: str, shape: list[int], architecture: str) -> None:
    classify(name, tuple(shape), architecture)


@given(st.from_regex(r"(enc\.|dec\.)?blk\.[0-9]{1,40}\.(ffn_(up|down)(_exps)?|attn_k|\.)*(\.weight|\.bias)?"))
def test_hostile_names_are_classified(name: str) -> None:
    classify(name, (), "llama")
