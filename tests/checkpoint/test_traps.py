"""The known traps of foreign checkpoints, a test each, on files made by hand; test_peers.py asks the peers."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("yaml")
from checkpoint.peers import LARGE, awake, fused, nx_config, save_large
from safetensors.torch import load_file, save_file

from openxlstm.checkpoint import states
from openxlstm.checkpoint.convert import convert, export
from openxlstm.checkpoint.hf_layout import from_hf_config, to_hf_config, to_in_tree_config
from openxlstm.checkpoint.layouts import open_foreign
from openxlstm.checkpoint.store import load
from openxlstm.models.presets import PRESETS
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLarge, xLSTMLargeConfig

S = "xlstm_block_stack."


def nx_file(tmp_path, *, pattern="ms", change=None, **options):
    """A state dict of NX-AI's xlstm in a file, written by our own export, then changed by hand. D 12, H 3, K 4."""
    fields = {"width": 12, "heads": 3, "mlstm_width": 24, "ffn_width": 20, "vocab_size": 23} | options
    model = awake(xLSTM(xLSTMConfig(pattern=pattern, **fields)))
    export(model, tmp_path / "nx", to="nxai")
    tensors = load_file(tmp_path / "nx" / "model.safetensors")
    if change is not None:
        change(tensors)
    file = tmp_path / "weights.pt"
    torch.save(tensors, file)
    return file, tensors, model


def large_tensors(layout="nxai-large", **options):
    """A model of the 7B architecture, and its tensors by NX-AI's (or transformers') names."""
    fields = {"vocab_size": 23, "width": 24, "blocks": 2, "heads": 3, "ffn_width": 64} | options
    model = awake(xLSTMLarge(xLSTMLargeConfig(**fields)))
    tensors = dict(model.state_dict())
    if layout == "nxai-large":
        tensors["embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    return model, tensors


FACTS = LARGE | {"embedding_dim": 24, "num_heads": 3, "vocab_size": 23}


def hf_folder(folder, tensors, **changes):
    """A Hugging Face folder with these tensors."""
    folder.mkdir()
    config = to_in_tree_config(xLSTMLargeConfig(vocab_size=23, width=24, blocks=2, heads=3, ffn_width=64))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.filterwarnings("ignore:.*no config was given")
def test_trap_01_norms_of_nx_hold_weight_minus_1_and_those_of_large_do_not(tmp_path):
    file, tensors, _ = nx_file(tmp_path)
    ours = load(file).state_dict()
    for theirs, name in (
        (f"{S}blocks.0.xlstm_norm.weight", "stack.blocks.0.norm.weight"),
        (f"{S}blocks.0.xlstm.mlstm_cell.outnorm.weight", "stack.blocks.0.head_norm.weight"),
        (f"{S}blocks.1.xlstm.group_norm.weight", "stack.blocks.1.head_norm.weight"),
        (f"{S}blocks.1.ffn_norm.weight", "stack.blocks.1.norm_ffn.weight"),
        (f"{S}post_blocks_norm.weight", "stack.norm.weight"),
    ):
        assert torch.equal(ours[name], 1 + tensors[theirs]), name
    _, tensors = large_tensors()
    ours = load(save_large(tensors, FACTS, tmp_path / "large")).state_dict()
    for name in ("norm_mlstm", "norm_ffn", "mlstm_layer.multihead_norm"):
        name = f"backbone.blocks.1.{name}.weight"
        assert torch.equal(ours[name], tensors[name]), name


@pytest.mark.filterwarnings("ignore:.*no config was given")
def test_trap_02_eps_of_norms_and_cells(tmp_path):
    nx = load(nx_file(tmp_path)[0]).config
    assert (nx.norm_eps, nx.eps) == (1e-5, 1e-6)
    _, tensors = large_tensors()
    large = load(save_large(tensors, FACTS, tmp_path / "a")).config
    assert (large.norm_eps, large.eps) == (1e-6, 1e-6)
    other = load(save_large(tensors, FACTS | {"norm_eps": 1e-5, "eps": 3e-6}, tmp_path / "b")).config
    assert (other.norm_eps, other.eps) == (1e-5, 3e-6)


@pytest.mark.filterwarnings("ignore:.*no config was given")
def test_trap_03_gate_projections_are_swapped_by_name_R_and_b_are_not(tmp_path):
    file, tensors, _ = nx_file(tmp_path, pattern="s")
    block, ours = f"{S}blocks.0.xlstm.", load(file).state_dict()
    for theirs, gate in (("fgate", "i"), ("igate", "f"), ("zgate", "z"), ("ogate", "o")):
        assert torch.equal(ours[f"stack.blocks.0.gate_{gate}.weight"], tensors[f"{block}{theirs}.weight"])
    b = tensors[f"{block}slstm_cell._bias_"].view(4, 3, 4)  # slot 0 is i, as in ours
    assert torch.equal(ours["stack.blocks.0.b"], b)
    R = tensors[f"{block}slstm_cell._recurrent_kernel_"]
    head, d, gate, e = 2, 1, 3, 0
    assert ours["stack.blocks.0.R"][head, d, gate, e] == R[head, gate * 4 + e, d]


@pytest.mark.filterwarnings("ignore:.*no config was given")
def test_trap_04_the_backend_that_wrote_an_slstm_is_read_off_R_and_holds_for_b_too(tmp_path):
    _, vanilla, model = nx_file(tmp_path, pattern="s")
    export(model, tmp_path / "ours", to="ours")
    convert(tmp_path / "ours", tmp_path / "cuda", to="nxai", slstm_layout="cuda")
    cuda = load_file(tmp_path / "cuda" / "model.safetensors")
    R, b = (f"{S}blocks.0.xlstm.slstm_cell.{name}" for name in ("_recurrent_kernel_", "_bias_"))
    assert vanilla[R].shape == (3, 16, 4)
    assert cuda[R].shape == (3, 4, 16)
    assert vanilla[b].shape == cuda[b].shape
    assert not torch.equal(vanilla[b], cuda[b])
    x, y = (load(folder).state_dict() for folder in (tmp_path / "nx", tmp_path / "cuda"))
    assert all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize("backend", ["vanilla", "cuda"])
def test_trap_04_both_layouts_as_the_peer_itself_converts_them(backend):
    """The peer's own translation between a file and [head, in, gate, out] is the judge; nothing is compiled for it."""
    pytest.importorskip("xlstm")
    from xlstm.blocks.slstm import cell

    from openxlstm.checkpoint.forms import CUDA, VANILLA

    kind = cell.sLSTMCell_cuda if backend == "cuda" else cell.sLSTMCell_vanilla
    peer = kind(cell.sLSTMCellConfig(hidden_size=12, num_heads=3, backend=backend), skip_backend_init=True)
    R, b = torch.randn_like(peer._recurrent_kernel_), torch.randn_like(peer._bias_)
    ours_R, ours_b = (CUDA if backend == "cuda" else VANILLA).read((R, b))
    assert torch.equal(ours_R, peer._recurrent_kernel_int2ext(R).view(3, 4, 4, 4))
    assert torch.equal(ours_b, peer._bias_int2ext(b).view(3, 4, 4).transpose(0, 1))


@pytest.mark.filterwarnings("ignore:.*no config was given")
def test_trap_05_what_gates_read_and_whether_they_are_capped(tmp_path):
    file, tensors, _ = nx_file(tmp_path, pattern="m")
    nx = load(file)
    weight = tensors[f"{S}blocks.0.xlstm.mlstm_cell.igate.weight"]
    assert weight.shape == (3, 3 * 24)  # columns q, k, v, and k unscaled: test_peers.py has the numbers
    assert torch.equal(nx.stack.blocks[0].gate_i.weight, weight)
    assert not hasattr(nx.config, "gate_soft_cap")
    _, tensors = large_tensors()
    large = load(save_large(tensors, FACTS, tmp_path / "large"))
    assert large.config.gate_soft_cap == 15
    assert large.backbone.blocks[0].mlstm_layer.igate_preact.weight.shape == (3, 24)


@pytest.mark.filterwarnings("ignore:.*no config was given")
def test_trap_06_order_of_what_is_stacked(tmp_path):
    """Reversing the halves of a stacked matrix changes the logits, so the order is known and not guessed."""
    file, tensors, model = nx_file(tmp_path)
    x = torch.randint(23, (1, 6))
    for name in (f"{S}blocks.0.xlstm.proj_up.weight", f"{S}blocks.1.ffn.proj_up.weight"):
        swapped = tensors | {name: torch.cat(tensors[name].chunk(2)[::-1])}
        torch.save(swapped, file)
        assert not torch.allclose(load(file)(x)[0], model(x)[0], atol=1e-3), name
    assert torch.equal(model.stack.blocks[0].up.weight, tensors[f"{S}blocks.0.xlstm.proj_up.weight"])
    model, tensors = large_tensors(qk_width=6, v_width=18)
    stacked = fused(tensors)
    layer, want = "backbone.blocks.0.mlstm_layer.", model.backbone.blocks[0].mlstm_layer
    q, k, v, o = stacked[f"{layer}qkv_opreact.weight"].split([6, 6, 18, 18])
    for part, module in ((q, want.q), (k, want.k), (v, want.v), (o, want.ogate_preact)):
        assert torch.equal(part, module.weight)
    loaded = load(save_large(stacked, FACTS | {"qk_dim_factor": 0.25, "v_dim_factor": 0.75}, tmp_path / "large"))
    for (name, a), (_, b) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.filterwarnings("ignore:.*no config was given")
def test_trap_07_the_newest_tap_is_the_last(tmp_path):
    file, tensors, _ = nx_file(tmp_path, pattern="m")
    theirs = tensors[f"{S}blocks.0.xlstm.conv1d.conv.weight"]
    assert theirs.shape == (24, 1, 4)
    conv = load(file).stack.blocks[0].conv
    assert torch.equal(conv.weight, theirs[:, 0])
    x = torch.randn(1, 5, 24)
    y = torch.nn.functional.conv1d(x.mT, theirs, conv.bias, padding=3, groups=24)[..., :5].mT
    torch.testing.assert_close(conv(x)[0], torch.nn.functional.silu(y))


def test_trap_08_the_matrix_memory_of_nx_is_scaled():
    C, n, m = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 1), torch.randn(2, 3, 1, 1)
    nx = states.nx_mlstm(C, n, m)
    assert torch.equal(nx.C, 2 * C)  # sqrt(K)
    assert torch.equal(nx.n, 2 * n[..., 0])
    (large,) = states.large_model({0: (C, n[..., 0], m[..., 0])}).blocks
    assert torch.equal(large.C, C)
    assert large.C.data_ptr() != C.data_ptr()
    assert torch.equal(large.m, m[..., 0, 0])


def test_trap_09_another_activation_is_refused(tmp_path):
    file, _, _ = nx_file(tmp_path)
    config = dataclasses.asdict(nx_config(pattern="ms", D=12, H=3))
    config["slstm_block"]["feedforward"]["act_fn"] = "swish"
    config["vocab_size"] = 23  # as in the file
    with pytest.raises(ValueError, match=r"feedforward says act_fn='swish'; only 'gelu' can be read"):
        load(file, config=config)


def test_trap_10_only_large_models_cap_logits(tmp_path):
    _, tensors = large_tensors()
    tensors["lm_head.weight"] *= 1e4
    model = load(save_large(tensors, FACTS, tmp_path / "a")).bfloat16()
    logits = model(torch.randint(23, (1, 4)))[0]
    assert logits.dtype == torch.float32
    assert 29 < logits.abs().max() <= 30
    assert load(save_large(tensors, FACTS | {"output_logit_soft_cap": 7}, tmp_path / "b")).config.logit_soft_cap == 7


def test_trap_11_the_feed_forward_width_is_that_of_the_tensor(tmp_path):
    """At D = 96 the peers' formula gives 256 and a true ceiling 320, as at 768 with 2048 and 2112."""
    facts = FACTS | {"embedding_dim": 96, "ffn_proj_factor": 2.6667}
    for width in (256, 320):
        _, tensors = large_tensors(width=96, ffn_width=width)
        assert load(save_large(tensors, facts, tmp_path / f"{width}")).config.ffn_width == width
    _, tensors = large_tensors(width=96, ffn_width=384)
    with pytest.raises(ValueError, match=r"means a feed-forward width of 256; the tensors have 384"):
        load(save_large(tensors, facts, tmp_path / "no"))
    for name in ("xlstm-large-164m", "xlstm-7b"):
        config = PRESETS[name].config
        assert from_hf_config(to_in_tree_config(config)) == config, name


def test_trap_12_query_width_is_the_truncated_product():
    config = {"model_type": "xlstm", "hidden_size": 80, "num_hidden_layers": 1, "num_heads": 2, "qk_dim_factor": 0.53}
    assert from_hf_config(config).QK == 42  # int(42.4); the config's own property says 64


def test_trap_13_hugging_face_has_two_names_for_a_size():
    config = xLSTMLargeConfig(vocab_size=23, width=24, blocks=2, heads=3)
    said = to_in_tree_config(config)
    assert said["hidden_size"] == said["embedding_dim"] == 24
    assert said["num_hidden_layers"] == said["num_blocks"] == 2
    with pytest.raises(ValueError, match="hidden_size is 4096 and embedding_dim, its other name, is 24"):
        from_hf_config(said | {"hidden_size": 4096})
    with pytest.raises(ValueError, match="num_hidden_layers is 32 and num_blocks"):
        from_hf_config(said | {"num_hidden_layers": 32})
    assert from_hf_config({key: value for key, value in said.items() if key != "hidden_size"}) == config
    with pytest.raises(ValueError, match="hidden_size is 25, and the fields of openxlstm make it 24"):
        from_hf_config(to_hf_config(config) | {"hidden_size": 25})


def test_trap_14_fields_that_hugging_face_ignores_are_not_believed(tmp_path):
    model, tensors = large_tensors("hf")
    with pytest.raises(ValueError, match="add_out_norm is false"):
        load(hf_folder(tmp_path / "a", tensors, add_out_norm=False))
    with pytest.raises(ValueError, match="use_bias is true"):
        load(hf_folder(tmp_path / "b", tensors, use_bias=True))
    with pytest.warns(UserWarning, match="tie_word_embeddings, which transformers' own xLSTM ignores"):
        loaded = load(hf_folder(tmp_path / "c", tensors, tie_word_embeddings=True))
    assert not loaded.config.tie_embeddings
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_trap_15_fused_matrices_of_block_1_are_not_those_of_block_10(tmp_path):
    model, tensors = large_tensors(blocks=12)
    loaded = load(save_large(fused(tensors), FACTS | {"num_blocks": 12}, tmp_path / "large", shards=2))
    for (name, a), (_, b) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    _, theirs = large_tensors("hf")
    loaded = load(hf_folder(tmp_path / "hf", fused(theirs), weight_mode="fused"))
    assert torch.equal(loaded.backbone.blocks[1].ffn.proj_up.weight, theirs["backbone.blocks.1.ffn.proj_up.weight"])
    convert(tmp_path / "large", tmp_path / "single", to="nxai-large")
    assert load_file(tmp_path / "single" / "model.safetensors").keys() == tensors.keys()


def test_trap_16_tied_files_hold_both_keys_and_they_are_equal(tmp_path):
    file, tensors, _ = nx_file(tmp_path, tie_embeddings=True)
    assert torch.equal(tensors["token_embedding.weight"], tensors["lm_head.weight"])
    said = json.loads(json.dumps(open_foreign(tmp_path / "nx", None)[0].config.to_dict()))
    assert said["tie_embeddings"]
    assert load(tmp_path / "nx").head is None
    tensors["lm_head.weight"] += 1
    torch.save(tensors, file)
    config = tmp_path / "nx" / "config.yaml"
    with pytest.raises(ValueError, match=r"token_embedding.weight and lm_head.weight are one tensor"):
        load(file, config=config)
    _, tensors = large_tensors("hf", tie_embeddings=True)  # equal by chance or not: untied stays untied
    tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"]
    assert load(hf_folder(tmp_path / "untied", tensors)).lm_head is not None
    assert load(hf_folder(tmp_path / "tied", tensors, tie_word_embeddings=True)).lm_head is None
    del tensors["lm_head.weight"]
    assert load(hf_folder(tmp_path / "once", tensors, tie_word_embeddings=True)).lm_head is None
    with pytest.raises(ValueError, match=r"lacks 'lm_head.weight'"):
        load(hf_folder(tmp_path / "headless", tensors))


@pytest.mark.filterwarnings("ignore:.*no config was given")
def test_trap_17_biases_that_a_peer_leaves_out_are_zero(tmp_path):
    _, tensors, _ = nx_file(tmp_path, bias=True)
    gates = {name for name in tensors if name.endswith("gate.bias")}
    assert gates == {f"{S}blocks.0.xlstm.mlstm_cell.{gate}.bias" for gate in ("igate", "fgate")}

    def ffn_without(t):
        for name in ("up", "down"):
            del t[f"{S}blocks.1.ffn.proj_{name}.bias"]

    file, _, model = nx_file(tmp_path / "b", bias=True, change=ffn_without)
    loaded = load(file)
    assert loaded.config.bias
    assert not loaded.stack.blocks[1].ffn_up.bias.any()
    assert torch.equal(loaded.stack.blocks[0].q.bias, model.stack.blocks[0].q.bias)


@pytest.mark.filterwarnings("ignore:.*no config was given")
def test_trap_18_every_row_of_the_vocabulary_is_kept(tmp_path):
    _, tensors = large_tensors(vocab_size=50304, width=24)
    folder = save_large(tensors, FACTS | {"vocab_size": 50304}, tmp_path / "large")
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    convert(folder, tmp_path / "ours", to="ours")
    assert load(tmp_path / "ours").lm_head.weight.shape[0] == 50304
    assert (tmp_path / "ours" / "tokenizer.json").is_file()


@pytest.mark.filterwarnings("ignore:.*no config was given")
def test_trap_19_a_stored_mask_is_left_behind(tmp_path):
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    file, _, model = nx_file(tmp_path, change=lambda t: t.update({f"{S}blocks.0.xlstm.mlstm_cell.causal_mask": mask}))
    loaded = load(file)
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_trap_20_the_length_of_the_context_is_no_property_of_the_weights(tmp_path):
    file, _, _ = nx_file(tmp_path, pattern="m", mlstm_width=64, heads=4, width=16)
    config = {
        "vocab_size": 23, "embedding_dim": 16, "num_blocks": 1, "context_length": 3,
        "mlstm_block": {"mlstm": {"proj_factor": 4.0}},
    }  # fmt: skip
    model = load(file, config=config)
    assert model(torch.randint(23, (1, 50)))[0].shape == (1, 50, 23)
