"""The network against two independent implementations, the optimiser, and the promises of the plumbing."""

import argparse
import errno
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, call
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import vit


def test_attention_equals_torch_multihead_attention():
    ours, theirs = vit.Attention(24, heads=3), nn.MultiheadAttention(24, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias.normal_())
        theirs.out_proj.weight.copy_(ours.proj.weight)
        theirs.out_proj.bias.copy_(ours.proj.bias.normal_())
    x = torch.randn(2, 5, 24)
    out, weights = ours(x)
    expected, expected_weights = theirs(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights, expected_weights)


def test_vit_equals_transformers_vit_with_our_weights():
    from transformers import ViTConfig, ViTModel

    ours = vit.ViT(image_size=16, patch_size=4, dim=24, depth=3, heads=3).eval()
    for p in ours.parameters():
        nn.init.normal_(p, std=0.3)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=16,
        patch_size=4,
        layer_norm_eps=1e-5,
    )
    theirs = ViTModel(config, add_pooling_layer=False).eval()
    state = {"embeddings.cls_token": ours.cls, "embeddings.position_embeddings": ours.positions}
    for side in ("weight", "bias"):
        state[f"embeddings.patch_embeddings.projection.{side}"] = getattr(ours.patch_embedding, side)
        state[f"layernorm.{side}"] = getattr(ours.norm, side)
    names = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "layernorm_before"]
    names += ["attention.o_proj", "layernorm_after", "mlp.fc1", "mlp.fc2"]
    for k, block in enumerate(ours.blocks):
        for side in ("weight", "bias"):
            parts = [block.norm1, block.attn.proj, block.norm2, block.mlp[0], block.mlp[2]]
            values = [*getattr(block.attn.qkv, side).chunk(3)] + [getattr(p, side) for p in parts]
            state |= {f"layers.{k}.{name}.{side}": value for name, value in zip(names, values, strict=True)}
    theirs.load_state_dict(state)  # strict: every weight of theirs comes from ours
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        expected = theirs(pixel_values=(images - 0.5) / 0.25).last_hidden_state
        torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-4)


def test_trace_changes_nothing_and_joins_up():
    encoder, images, trace = vit.ViT(dim=32, depth=3).eval(), torch.rand(2, 3, 32, 32), []
    torch.testing.assert_close(encoder(images, trace), encoder(images), rtol=0, atol=0)
    assert len(trace) == 3
    for this, following in zip(trace, trace[1:]):
        assert this["after"] is following["before"]
    torch.testing.assert_close(trace[0]["weights"].sum(-1), torch.ones(2, 4, 17))


def test_without_positions_a_block_does_not_know_the_order_of_its_tokens():
    block, x, order = vit.Block(32, 4), torch.randn(2, 7, 32), torch.randperm(7)
    torch.testing.assert_close(block(x[:, order]), block(x)[:, order])


def test_model_m_paints_the_masked_patches_from_their_own_tokens():
    images = torch.rand(2, 3, 32, 32)
    masked = torch.tensor([[3, 0], [15, 7]])
    model = vit.ModelM(vit.ViT(dim=32, depth=1)).eval()
    angle, pixels = model(images, masked)
    tokens = model.encoder(images)
    torch.testing.assert_close(pixels[1, 0], model.reconstruction_head(tokens[1, 1 + 15]))
    torch.testing.assert_close(angle, model.rotation_head(tokens[:, 0]))


def test_greyscale_images_need_one_word():
    model = vit.Classifier(vit.ViT(image_size=28, patch_size=7, dim=16, depth=1, channels=1), classes=10)
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert vit.ModelM(model.encoder).reconstruction_head.out_features == 49


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="heads"):
        vit.Attention(10, 3)
    with pytest.raises(ValueError, match="patches"):
        vit.ViT(image_size=30)


@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (2, 3, 39, 32), (2, 1, 32, 32), (3, 32, 32)])
def test_images_of_another_size_than_the_encoder_was_made_for_are_refused(shape):
    with pytest.raises(ValueError, match=r"are not \[B, 3, 32, 32\]"):
        vit.ViT(dim=16, depth=1)(torch.zeros(shape))


# -------------------------------------------------------------------------------------------- the optimiser


def singular(values, rows, columns):
    """A matrix with these singular values, and what U V^T is."""
    u, v = torch.linalg.qr(torch.randn(rows, rows))[0], torch.linalg.qr(torch.randn(columns, rows))[0]
    return u @ torch.diag(values) @ v.T, u @ v.T


@pytest.mark.parametrize("precision, near", [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("rows, columns", [(32, 32), (32, 80)])
def test_orthogonalise_keeps_the_singular_vectors_and_brings_the_values_near_one(
    rows, columns, precision, near
):
    matrix, expected = singular(torch.linspace(0.2, 3, rows), rows, columns)
    found = vit.orthogonalise(matrix[None].to(precision))[0].float()
    u, values, vt = torch.linalg.svd(found, full_matrices=False)
    assert 0.6 < values.min() and values.max() < 1.3
    torch.testing.assert_close(u @ vt, expected, rtol=0, atol=near)  # the same vectors, though values differ


def test_many_matrices_at_once_are_the_same_as_one_by_one_and_zero_stays_zero():
    matrices = torch.randn(5, 24, 40)
    matrices[2] = 0
    alone = torch.cat([vit.orthogonalise(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(vit.orthogonalise(matrices), alone)
    assert torch.equal(alone[2], torch.zeros(24, 40))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_muon_steps_as_torchs_own_up_to_the_rounding_of_bfloat16(shape):
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().clone())
    first = vit.Muon([{"params": [ours], "parts": 1}], lr=0.02, weight_decay=0.1)
    second = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        first.step()
        second.step()
    step = 0.02 * 0.2  # of an entry, on average
    assert (ours - theirs).square().mean().sqrt() < 0.05 * step


def test_the_parts_of_a_qkv_do_not_mix_and_a_patch_embedding_is_one_matrix():
    whole, alone = nn.Parameter(torch.zeros(3 * 16, 16)), nn.Parameter(torch.zeros(16, 16))
    patches, flat = nn.Parameter(torch.zeros(16, 3, 4, 4)), nn.Parameter(torch.zeros(16, 48))
    whole.grad, patches.grad = torch.randn(48, 16), torch.randn(16, 3, 4, 4)
    alone.grad, flat.grad = whole.grad[16:32].clone(), patches.grad.view(16, 48).clone()
    whole.grad[:16] *= 1000  # the neighbour's scale is its own business
    vit.Muon(
        [{"params": [whole], "parts": 3}, {"params": [alone, patches, flat], "parts": 1}], lr=0.01
    ).step()
    torch.testing.assert_close(whole[16:32], alone)
    torch.testing.assert_close(patches.view(16, 48), flat)


def test_a_step_of_muon_is_as_long_as_one_of_adamw():
    weight = nn.Parameter(torch.zeros(64, 192))
    weight.grad = torch.randn(64, 192)
    vit.Muon([{"params": [weight], "parts": 1}], lr=1.0, weight_decay=0.0).step()
    assert weight.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.15)


def groups(model, kind):
    """Which parameters Muon steps, which AdamW does and lets decay, and which without."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = {"by_muon": set(), "decayed": set(), "left": set()}
    for group in vit.make_optimizer(model, kind, 1e-3, 0.1).param_groups:
        what = "by_muon" if "parts" in group else "decayed" if group["weight_decay"] else "left"
        found[what] |= {names[id(p)] for p in group["params"]}
    assert sum(map(len, found.values())) == len(names)  # each once
    return found


def test_muon_gets_the_matrices_inside_and_adamw_the_rest_of_which_only_matrices_decay():
    model = vit.ModelM(vit.ViT(dim=16, depth=1))
    block = [f"encoder.blocks.0.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")]
    heads = ["rotation_head.weight", "reconstruction_head.weight"]
    muon, adamw = groups(model, "muon"), groups(model, "adamw")
    assert muon["by_muon"] == {*block, "encoder.patch_embedding.weight"}
    assert muon["decayed"] == set(heads) and muon["left"] == adamw["left"]
    assert adamw["decayed"] == muon["by_muon"] | muon["decayed"]
    assert {"encoder.cls", "encoder.positions", "encoder.norm.weight"} <= muon["left"]


def test_muon_gets_the_matrices_of_temporal_and_cross_attention():
    import multimodal
    import video

    divided = groups(video.FactorisedAttention(vit.ViT(dim=16, depth=2), 1, 4), "muon")["by_muon"]
    assert {"temporals.0.attn.qkv.weight", "temporals.0.attn.proj.weight"} <= divided
    fusion = multimodal.Fusion(video.FactorisedEncoder(vit.ViT(dim=16, depth=2), 1, 4), 8)
    names = ("block.attn.q", "block.attn.kv", "block.attn.proj", "block.mlp.0", "video.blocks.0.attn.qkv")
    assert {f"{name}.weight" for name in names} <= groups(fusion, "muon")["by_muon"]


def test_what_muon_leaves_is_stepped_as_by_adamw_itself():
    ours, theirs = (vit.Classifier(vit.ViT(dim=16, depth=1)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    pair = [vit.make_optimizer(model, kind, 1e-2, 0.1) for model, kind in ((ours, "muon"), (theirs, "adamw"))]
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), pair):
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.1)
            optimizer.step()
    assert torch.equal(ours.head.weight, theirs.head.weight)
    assert torch.equal(ours.encoder.cls, theirs.encoder.cls)
    assert not torch.equal(ours.encoder.patch_embedding.weight, theirs.encoder.patch_embedding.weight)


def test_class_and_position_tables_of_blip_and_clip_do_not_decay():
    import open_clip
    from transformers import BlipConfig, BlipForConditionalGeneration

    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = small | {"vocab_size": 20, "encoder_hidden_size": 16, "max_position_embeddings": 8}
    config = BlipConfig(vision_config=small | {"image_size": 16, "patch_size": 8}, text_config=text)
    blip = groups(BlipForConditionalGeneration(config), "muon")
    tables = ["vision_model.embeddings.class_embedding", "vision_model.embeddings.position_embedding"]
    tables += [f"text_decoder.bert.embeddings.{name}_embeddings.weight" for name in ("word", "position")]
    assert set(tables) <= blip["left"]
    assert "vision_model.encoder.layers.0.self_attn.qkv.weight" in blip["by_muon"]
    assert "text_decoder.bert.encoder.layer.0.crossattention.self.query.weight" in blip["by_muon"]
    image = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    words = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    clip = groups(open_clip.CLIP(8, image, words), "muon")
    assert {"token_embedding.weight", "positional_embedding", "visual.class_embedding"} <= clip["left"]
    assert "transformer.resblocks.0.attn.in_proj_weight" in clip["by_muon"]


def test_a_model_of_other_names_is_not_given_to_adamw_at_muons_learning_rate():
    with pytest.raises(ValueError, match="extend vit.INSIDE, or choose adamw"):
        vit.make_optimizer(nn.Linear(3, 2), "muon", 4e-3, 0.0)
    assert len(vit.make_optimizer(nn.Linear(3, 2), "adamw", 1e-3, 0.0).param_groups) == 2


def test_the_learning_rate_goes_up_a_line_and_down_a_line_to_zero():
    rates = [vit.triangle(step, total=100, warmup=0.1) for step in range(101)]
    assert rates[10] == 1.0 and rates[100] == 0.0 and rates[55] == pytest.approx(0.5)
    assert rates[4] == pytest.approx(5 / 11)
    assert vit.triangle(0, 5, 0.0) == 1.0 and vit.triangle(3, 4, 1.0) > 0 and vit.triangle(7, 5, 0.1) == 0.0


def test_fit_linear_reaches_the_optimum_where_the_gradient_vanishes():
    x, y = torch.randn(200, 6), torch.randint(3, (200,))
    layer = vit.fit_linear(x, y, decay=1e-2, classes=3)
    loss = nn.functional.cross_entropy(layer(x), y) + 1e-2 * layer.weight.square().sum()
    loss.backward()
    assert layer.weight.grad.abs().max() < 1e-4 and layer.bias.grad.abs().max() < 1e-4


# -------------------------------------------------------------------------------------------------- a run


def options(out, **more):
    usual = {"out": str(out), "epochs": 2, "seed": 0, "fresh": False, "keep_epochs": False, "split": "test"}
    usual |= {"device": "cpu", "precision": "float32", "limit": None, "lr": 0.01}
    return argparse.Namespace(**usual | more)


def tiny_run(out, kind="muon", **more):
    """A run of two epochs of three steps, with a network that Muon has something to do in."""
    args = options(out, **more)
    torch.manual_seed(0)
    model = vit.Classifier(vit.ViT(16, 8, 16, depth=1, heads=2))
    if kind == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), args.lr)
    else:
        optimizer = vit.make_optimizer(model, kind, args.lr, 0.05)
    schedule = LambdaLR(optimizer, lambda step: vit.triangle(step, 3 * args.epochs, 0.1))
    recipe = vit.recipe_of(args, torch.zeros(3), torch.zeros(3))
    return vit.Run(args, "tiny", model, optimizer, schedule, 3, recipe)


def train(run, epochs=9, poison=None, **metrics):
    """Train until the run's end, or so many epochs; poison: (epoch, step) whose gradient is not finite."""
    for epoch in range(run.epoch, min(epochs, run.args.epochs)):
        for step in range(3):
            x = torch.rand(4, 3, 16, 16, generator=run.generator)
            loss = run.model(x).square().mean()
            loss.backward()
            if poison == (epoch, step):
                run.model.head.bias.grad[0] = torch.inf
            run.optimizer.step()
            run.schedule.step()
            run.optimizer.zero_grad()
            run.log(loss=loss)
        run.save(**metrics)
    return run


def weights(path):
    return vit.read_checkpoint(path)["model"]


@pytest.mark.parametrize("kind", ["muon", "adamw", "sgd"])
def test_a_stopped_run_goes_on_bit_for_bit_by_any_optimizer(tmp_path, kind):
    train(tiny_run(tmp_path / "whole", kind))
    train(tiny_run(tmp_path / "part", kind), epochs=1)
    train(tiny_run(tmp_path / "part", kind))
    whole, part = (weights(tmp_path / name / "tiny.pt") for name in ("whole", "part"))
    assert all(torch.equal(value, part[name]) for name, value in whole.items())


def test_a_finished_run_is_taken_as_it_is(tmp_path, capsys):
    train(tiny_run(tmp_path))
    before = (tmp_path / "tiny.pt").read_bytes()
    again = train(tiny_run(tmp_path))
    assert "finished before" in capsys.readouterr().out and (tmp_path / "tiny.pt").read_bytes() == before
    assert again.epoch == 2 and len(again.row()["training"]) == 1


@pytest.mark.parametrize("poison", [(1, 0), (1, 2)])
def test_weights_that_are_not_finite_are_not_kept_also_after_the_last_step_of_all(tmp_path, poison):
    """A gradient that is not finite in an epoch's last step leaves a finite loss."""
    with pytest.raises(SystemExit, match="weights are not finite after epoch 2, which is not kept"):
        train(tiny_run(tmp_path), poison=poison)
    state = vit.read_checkpoint(tmp_path / "tiny.pt")
    assert state["epoch"] == 1 and all(v.isfinite().all() for v in state["model"].values())


def test_any_kind_of_number_may_be_kept_with_an_epoch_and_in_a_row(tmp_path):
    """One that weights_only does not know would make a checkpoint that nobody can read again."""
    numpy = pytest.importorskip("numpy")
    run = train(tiny_run(tmp_path), f1=numpy.float64(0.25), share=torch.tensor(0.5), count=3)
    history = vit.read_checkpoint(tmp_path / "tiny.pt")["history"]
    assert (history["f1"], history["share"], history["count"]) == ([0.25] * 2, [0.5] * 2, [3.0] * 2)
    vit.record(
        run.args, "x", torch.zeros(1), torch.zeros(1), value=numpy.float32(0.5), tensor=torch.tensor(1.5)
    )
    assert '"tensor": 1.5' in (tmp_path / "rows/x.json").read_text()


def test_fresh_forgets_the_old_run_at_once_and_no_other(tmp_path):
    """Else a stop in its first epoch would bring the old weights back, as "finished before"."""
    train(tiny_run(tmp_path))
    (tmp_path / "tiny-2.pt").write_bytes(b"another run's")
    tiny_run(tmp_path, fresh=True)
    assert tiny_run(tmp_path).epoch == 0 and (tmp_path / "tiny-2.pt").exists()


def test_kept_epochs_are_the_weights_of_their_time(tmp_path):
    train(tiny_run(tmp_path, keep_epochs=True))
    first, second = (vit.read_checkpoint(tmp_path / "tiny" / f"epoch{k}.pt") for k in (1, 2))
    last = weights(tmp_path / "tiny.pt")
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert all(torch.equal(v, last[k]) for k, v in second["model"].items())
    assert not all(torch.equal(v, last[k]) for k, v in first["model"].items())


def test_another_recipe_is_not_gone_on_with_and_a_new_option_is_no_other_recipe(tmp_path):
    train(tiny_run(tmp_path, lr=0.001))
    with pytest.raises(SystemExit, match="tiny.pt was made with another lr: 0.001, not 1.0; add --fresh"):
        tiny_run(tmp_path, lr=1.0)
    with pytest.raises(SystemExit, match="another epochs: 2, not 3"):
        tiny_run(tmp_path, lr=0.001, epochs=3)
    assert tiny_run(tmp_path, lr=0.001, momentum=0.9).epoch == 2
    assert tiny_run(tmp_path, lr=1.0, fresh=True).epoch == 0


def test_half_a_run_of_other_code_is_not_gone_on_with_and_a_finished_one_says_so(
    tmp_path, monkeypatch, capsys
):
    train(tiny_run(tmp_path), epochs=1)
    train(tiny_run(tmp_path / "finished"))
    monkeypatch.setattr(vit, "hash_of_code", lambda: "edited")
    with pytest.raises(SystemExit, match="made with another code: .*, not 'edited'; add --fresh"):
        tiny_run(tmp_path)
    assert tiny_run(tmp_path / "finished").epoch == 2
    assert "was made with another code" in capsys.readouterr().out


def test_a_killed_run_ends_with_the_same_weights_bit_for_bit(tmp_path):
    few = "--data synthetic --limit 128 --batch 32 --dim 32 --epochs 3 --device cpu --out".split()
    line = ["ssl.py", "pretrain", "--task", "m", *few]
    body = (
        f"import sys, os; sys.path.insert(0, {str(ROOT)!r}); import torch, vit\n"
        "old = vit.Run.log\ndef log(self, **m):\n    old(self, **m)\n"
        "    if (self.epoch, self.batches) == (1, 2): os.kill(os.getpid(), 9)\nvit.Run.log = log\n"
        f"sys.argv = {[*line, str(tmp_path / 'killed')]!r}\n"
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('stage1', {str(ROOT / 'ssl.py')!r})\n"
        "stage1 = importlib.util.module_from_spec(spec); sys.modules['stage1'] = stage1\n"
        "spec.loader.exec_module(stage1); import data; stage1.main()"
    )
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    assert vit.read_checkpoint(tmp_path / "killed/m.pt")["epoch"] == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            vit, "hash_of_code", lambda: vit.read_checkpoint(tmp_path / "killed/m.pt")["recipe"]["code"]
        )
        assert "going on after epoch 1 of 3" in call(*line, tmp_path / "killed")
    call(*line, tmp_path / "whole")
    whole, killed = (vit.read_checkpoint(tmp_path / d / "m.pt") for d in ("whole", "killed"))
    assert whole["history"] == killed["history"]
    for name, value in whole["model"].items():
        assert torch.equal(value, killed["model"][name]), name


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    def write(content):
        with vit.whole_file(tmp_path / "f") as file:
            file.write(content)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match="No space left"):
        write(b"new")
    assert (tmp_path / "f").read_bytes() == b"old" and list(tmp_path.iterdir()) == [tmp_path / "f"]


# ------------------------------------------------------------------------------------ device and precision


def test_a_gpu_without_kernels_in_this_torch_gets_one_sentence(monkeypatch, tmp_path):
    """As an old card that CUDA lists: it fails at the first kernel."""

    def zeros(*shape, device="cpu", zeros=torch.zeros):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(SystemExit, match="'cuda' can't be used .*no kernel image.*try --device cpu"):
        vit.set_up(options(tmp_path, device="cuda"))


@pytest.mark.parametrize(
    "flags, found", [("avx2 avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("avx2", "float32")]
)
def test_a_cpu_computes_in_bfloat16_if_its_flags_say_so(tmp_path, monkeypatch, flags, found):
    """Not by a race, which on a busy machine ends now so, now so."""
    monkeypatch.setattr(vit.pathlib.Path, "read_text", lambda _: f"flags : fpu {flags} sse")
    monkeypatch.setattr(vit.pathlib.Path, "exists", lambda _: True)
    args = options(tmp_path, precision="auto")
    _, autocast = vit.set_up(args)
    with autocast:
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == getattr(torch, found)
    assert args.precision == found


# ------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize(
    "content, message", [(None, "there is no"), (b"no", "damaged, or no"), ({}, "damaged, or no")]
)
def test_missing_and_foreign_checkpoints_get_one_sentence(tmp_path, content, message):
    path = tmp_path / "c.pt"
    if isinstance(content, dict):
        torch.save({"weights": torch.zeros(3)}, path)
    elif content:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=f"c.pt: {message} checkpoint"):
        vit.read_checkpoint(path)


def test_weights_of_a_network_that_was_edited_since_name_what_is_missing(tmp_path):
    """A layer more, the first thing that a student tries."""
    edited = vit.ViT(32, 8, 32, depth=1)
    before = {"encoder." + name: x for name, x in edited.state_dict().items() if "norm2" not in name}
    torch.save({"model": before, "config": edited.config, "epoch": 1, "recipe": {}}, tmp_path / "old.pt")
    few = ["--data", "synthetic", "--limit", 20, "--device", "cpu", "--out", tmp_path]
    text = call("ssl.py", "probe", "--checkpoint", tmp_path / "old.pt", *few, code=1)
    assert re.search("blocks.0.norm2.weight(.|\n)*undo the edit, or train anew", text)


def test_a_checkpoint_never_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"config": Evil(), "model": {}, "epoch": 1, "recipe": {}}, tmp_path / "c.pt")
    with pytest.raises(SystemExit, match="damaged, or no checkpoint"):
        vit.read_checkpoint(tmp_path / "c.pt")
    assert not (tmp_path / "ran").exists()


def test_a_home_folder_is_found_behind_an_equals_sign(monkeypatch, tmp_path):
    """Which the shell leaves as it is: a folder called ~ would be one slip from `rm -r ~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert vit.common_options().parse_args(["--out=~/x"]).out == f"{tmp_path}/x"
