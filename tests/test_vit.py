"""The network against two independent implementations, and the promises of the plumbing."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import filelock
import pytest
import torch
from conftest import ROOT, call, run
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
    # transformers 5 renamed its layers
    modern = any(name.startswith("layers.") for name in theirs.state_dict())
    for k, block in enumerate(ours.blocks):
        for side in ("weight", "bias"):
            q, key, v = getattr(block.attn.qkv, side).chunk(3)
            parts = [block.norm1, block.attn.proj, block.norm2, block.mlp[0], block.mlp[2]]
            values = [q, key, v] + [getattr(p, side) for p in parts]
            old = [
                "attention.attention.query",
                "attention.attention.key",
                "attention.attention.value",
                "layernorm_before",
                "attention.output.dense",
                "layernorm_after",
                "intermediate.dense",
                "output.dense",
            ]
            new = [
                "attention.q_proj",
                "attention.k_proj",
                "attention.v_proj",
                "layernorm_before",
                "attention.o_proj",
                "layernorm_after",
                "mlp.fc1",
                "mlp.fc2",
            ]
            prefix = f"layers.{k}." if modern else f"encoder.layer.{k}."
            state |= {f"{prefix}{name}.{side}": value for name, value in zip(new if modern else old, values)}
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
    model = vit.JointM(vit.ViT(dim=32, depth=1)).eval()
    angle, pixels, z = model(images, masked)
    tokens = model.encoder(images)
    torch.testing.assert_close(pixels[1, 0], model.reconstruction_head(tokens[1, 1 + 15]))
    torch.testing.assert_close(z, model.projector(tokens[:, 0]))
    alone = vit.ModelM(model.encoder)
    alone.load_state_dict(model.state_dict(), strict=False)
    assert all(torch.equal(a, b) for a, b in zip(alone(images, masked), (angle, pixels)))


def test_a_stem_shows_each_token_its_own_patch_only():
    encoder, images = vit.ViT(dim=32, depth=1, stem=True), torch.rand(2, 3, 32, 32)
    changed = images.clone()
    changed[:, :, 8:16, 16:24] = 0  # patch 6: second row, third column
    moved = (encoder.embed(images) != encoder.embed(changed)).any(dim=-1)  # [2, 17]
    assert moved.nonzero().tolist() == [[0, 7], [1, 7]]
    alone = encoder.patch_embedding.layers(vit.standardise(images[:, :, 8:16, 16:24]))[:, :, 0, 0]  # [2, D]
    torch.testing.assert_close(encoder.embed(images)[:, 7] - encoder.positions[0, 7], alone)


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
    first = vit.Muon([ours], lr=0.02, weight_decay=0.1)
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
    vit.Muon([{"params": [whole], "parts": 3}, {"params": [alone, patches, flat]}], lr=0.01).step()
    torch.testing.assert_close(whole[16:32], alone)
    torch.testing.assert_close(patches.view(16, 48), flat)


def test_a_step_of_muon_is_as_long_as_one_of_adamw():
    weight = nn.Parameter(torch.zeros(64, 192))
    weight.grad = torch.randn(64, 192)
    vit.Muon([weight], lr=1.0).step()
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
    model = vit.JointM(vit.ViT(dim=16, depth=1))
    block = [f"encoder.blocks.0.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")]
    heads = ["rotation_head.weight", "reconstruction_head.weight", "projector.0.weight", "projector.2.weight"]
    muon, adamw = groups(model, "muon"), groups(model, "adamw")
    assert muon["by_muon"] == {*block, "encoder.patch_embedding.weight"}
    assert muon["decayed"] == set(heads) and muon["left"] == adamw["left"]
    assert adamw["decayed"] == muon["by_muon"] | muon["decayed"]
    assert {"encoder.cls", "encoder.positions", "encoder.norm.weight"} <= muon["left"]


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


def test_a_model_that_is_only_a_block_is_stepped():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(3, 2)])})
    optimizer = vit.make_optimizer(model, "muon", 1e-2, 0.0)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before))


def test_a_model_of_other_names_is_not_given_to_adamw_at_muons_learning_rate():
    with pytest.raises(ValueError, match="extend vit.INSIDE, or choose adamw"):
        vit.make_optimizer(nn.Linear(3, 2), "muon", 4e-3, 0.0)
    assert len(vit.make_optimizer(nn.Linear(3, 2), "adamw", 1e-3, 0.0).param_groups) == 2


def test_muon_never_waits_for_the_device():
    """On torch's meta device a tensor has no values; reading one raises."""
    model = vit.Classifier(vit.ViT(dim=16, depth=1)).to("meta")
    model(torch.empty(2, 3, 32, 32, device="meta")).sum().backward()
    matrices = [p for name, p in model.named_parameters() if vit.INSIDE.search(name) and p.ndim > 1]
    vit.Muon(matrices, lr=0.01, precision=torch.bfloat16).step()


# ------------------------------------------------------------------------------------------------------------


def tiny_run(out, epochs=2, settings=None, kind="muon", **options):
    """A run of three steps an epoch, with what a loop needs."""
    machine = vit.set_up("cpu", "float32", seed=1)
    model = vit.Classifier(vit.ViT(dim=16, depth=1))
    if kind == "sgd":  # a student's own line
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    else:
        optimizer = vit.make_optimizer(model, kind, 1e-3, 0.1)
    schedule = LambdaLR(optimizer, lambda step: vit.warmup_cosine(step, 3 * epochs, 0.1))
    settings = {"epochs": epochs} | (settings or {})
    return vit.Run("tiny", model, optimizer, schedule, machine, settings, epochs, 3, 8, out, **options)


def batch_loss(run):
    """The loss of a drawn batch."""
    return run.model(torch.rand(8, 3, 32, 32, generator=run.generator)).square().mean()


def train(run, poison=None, every=1, epochs=None):
    """The loop as every stage has it; gradients of `every` steps are added up; stopped after `epochs`."""
    done = run.epoch * 3
    for epoch in range(run.epoch, run.epochs):
        for k in range(3):
            loss = batch_loss(run)
            if (epoch, k) == poison:
                loss = loss * float("nan")
            loss.backward()
            done += 1
            if done % every == 0:
                run.optimizer.step()
                run.schedule.step()
                run.optimizer.zero_grad(set_to_none=True)  # as PyTorch's own take it
            run.log(loss=loss)
        run.save()
        if epoch + 1 == epochs:
            return
    run.finish()


def weights(path):
    return vit.read_checkpoint(path)["model"]


def test_the_learning_rate_warms_up_then_falls_to_zero():
    rates = [vit.warmup_cosine(step, total=100, warmup=0.1) for step in range(100)]
    assert 0 < rates[0] < 0.2 and rates[10] == 1.0 and rates[99] < 0.001
    assert all(a < b for a, b in zip(rates[:10], rates[1:11]))
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    assert [vit.warmup_cosine(step, 1, 0.1) for step in range(1)] and vit.warmup_cosine(0, 5, 0.0) == 1.0


def test_a_loss_that_is_not_finite_names_stage_and_epoch_and_keeps_the_last_good_epoch(tmp_path):
    with pytest.raises(FloatingPointError, match="tiny: the loss is not finite in epoch 2"):
        train(tiny_run(tmp_path), poison=(1, 2))
    state = vit.read_checkpoint(tmp_path / "tiny.pt")
    assert state["epoch"] == 1 and all(v.isfinite().all() for v in state["model"].values())


def test_a_stopped_run_goes_on_bit_for_bit_by_any_optimizer_also_with_gradients_not_yet_spent(tmp_path):
    for kind, every in [
        ("muon", 1),
        ("muon", 2),
        ("adamw", 1),
        ("sgd", 1),
    ]:  # 2: of three steps half a sum is left
        out = tmp_path / f"{kind}{every}"
        train(tiny_run(out / "whole", kind=kind), every=every)
        train(tiny_run(out / "part", kind=kind), every=every, epochs=1)
        train(tiny_run(out / "part", kind=kind), every=every)
        whole, part = (weights(out / name / "tiny.pt") for name in ("whole", "part"))
        assert all(torch.equal(value, part[name]) for name, value in whole.items())


def test_a_run_that_is_stopped_early_and_finished_is_finished(tmp_path):
    run = tiny_run(tmp_path, epochs=5)
    train(run, epochs=2)
    run.finish()
    again = tiny_run(tmp_path, epochs=5)
    assert (again.epoch, again.epochs, len(again.history["loss"])) == (2, 2, 2)


def test_a_run_that_is_stopped_inside_an_epoch_is_not_taken_for_its_last_one(tmp_path):
    run = tiny_run(tmp_path, epochs=5)
    train(run, epochs=1)
    run.log(loss=0.5)  # a plain number will do
    with pytest.raises(SystemExit, match="stopped inside epoch 2; call save"):
        run.finish()


def test_a_schedule_that_counts_other_steps_than_the_loop_is_told(tmp_path, capsys):
    train(tiny_run(tmp_path / "a"))
    assert "of its peak" not in capsys.readouterr().out
    train(tiny_run(tmp_path / "b"), every=2)
    assert "the learning rate ended at" in capsys.readouterr().out


def test_dropout_draws_the_same_numbers_after_a_stop(tmp_path):
    def run(out):
        run = tiny_run(out)
        run.model.head = nn.Sequential(nn.Dropout(0.5), run.model.head)
        run.optimizer = torch.optim.SGD(run.model.parameters(), 0.1)
        run.schedule = LambdaLR(run.optimizer, lambda step: vit.warmup_cosine(step, 6, 0.1))
        if run.path.exists():
            run.resume()
        return run

    torch.manual_seed(0)
    train(run(tmp_path / "whole"))
    torch.manual_seed(0)
    first = run(tmp_path / "part")
    train(first, epochs=1)
    again = tiny_run(tmp_path / "other")  # another draw in between
    state = vit.read_checkpoint(first.path)
    assert torch.equal(state["random"], torch.get_rng_state()) is False and again.epoch == 0
    torch.set_rng_state(state["random"])
    train(first)
    whole, part = (weights(tmp_path / name / "tiny.pt") for name in ("whole", "part"))
    assert all(torch.equal(value, part[name]) for name, value in whole.items())


def test_fresh_forgets_the_old_run_at_once(tmp_path):
    """Else a stop in its first epoch would bring the old weights back, as "finished before"."""
    train(tiny_run(tmp_path))
    tiny_run(tmp_path, fresh=True)
    assert tiny_run(tmp_path).epoch == 0


def test_a_resumed_run_keeps_its_precision_and_leaves_that_of_others_alone(tmp_path):
    machine = vit.Machine(torch.device("cpu"), "bfloat16", "a test", 1)
    run = tiny_run(tmp_path)
    run.machine = machine
    train(run, epochs=1)
    now = vit.set_up("cpu", "float32", 1)
    assert tiny_run(tmp_path).machine.precision == "bfloat16" and now.precision == "float32"


def test_kept_epochs_are_the_checkpoints_of_their_time(tmp_path):
    train(tiny_run(tmp_path, epochs=1))
    train(tiny_run(tmp_path / "kept", keep_epochs=True))
    first, second, last = (
        vit.read_checkpoint(tmp_path / "kept" / f"{name}.pt")
        for name in ("tiny-epoch1", "tiny-epoch2", "tiny")
    )
    assert (first["epoch"], second["epoch"]) == (1, 2) and len(first["history"]["loss"]) == 1
    assert all(torch.equal(v, last["model"][k]) for k, v in second["model"].items())
    assert not all(torch.equal(v, last["model"][k]) for k, v in first["model"].items())


def test_other_settings_do_not_resume_silently(tmp_path):
    train(tiny_run(tmp_path, settings={"lr": 0.001}))
    with pytest.raises(SystemExit, match="tiny.pt was made with another lr: 0.001, not 1.0; add --fresh"):
        tiny_run(tmp_path, settings={"lr": 1.0})
    with pytest.raises(SystemExit, match="another epochs: 2, not 3 .its learning rate falls to zero"):
        tiny_run(tmp_path, epochs=3, settings={"lr": 0.001})
    assert tiny_run(tmp_path, settings={"lr": 1.0}, fresh=True).epoch == 0


def edit(path):
    path.write_text("# a comment\n" + path.read_text())


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder that vit.py takes for its own, with the file of one loaded module in it."""
    copy = tmp_path / "project" / "vit.py"
    copy.parent.mkdir()
    shutil.copy(ROOT / "vit.py", copy)
    monkeypatch.setattr(vit, "__file__", str(copy))
    monkeypatch.setattr(vit, "SOURCES", {})
    return copy


def test_half_a_run_of_other_code_is_not_gone_on_with_and_a_finished_one_says_so(project, tmp_path, capsys):
    train(tiny_run(tmp_path), epochs=1)
    edit(project)
    vit.SOURCES.clear()  # as in a new process
    with pytest.raises(
        SystemExit, match="vit.py has been edited since the first half of .*undo the edit, or add"
    ):
        tiny_run(tmp_path)
    train(tiny_run(tmp_path, fresh=True))
    (project.parent / "other.py").write_text("x = 1")  # not loaded
    tiny_run(tmp_path)
    assert "finished before" in (text := capsys.readouterr().out) and "edited" not in text
    edit(project)
    for _ in range(2):  # also when it is asked a second time
        vit.SOURCES.clear()
        train(tiny_run(tmp_path))
        text = capsys.readouterr().out
        assert "finished before" in text and "vit.py has been edited since: --fresh" in text


def test_a_file_that_is_edited_after_it_was_loaded_is_told(project):
    """As in a notebook, which goes on with the old one."""
    assert vit.loaded_code() == vit.loaded_code() and "vit.py" in vit.loaded_code()
    edit(project)
    with pytest.raises(SystemExit, match="vit.py has been edited since it was loaded; restart Python"):
        vit.loaded_code()


def test_a_killed_run_ends_with_the_same_weights_bit_for_bit(tmp_path):
    few = "--data synthetic --limit 128 --batch 32 --dim 32 --epochs 3 --device cpu --out".split()
    line = ["ssl.py", "pretrain", "--task", "m", *few]
    body = (
        f"import sys, os; sys.path.insert(0, {str(ROOT)!r}); import torch, vit\n"
        "old = vit.Run.log\ndef log(self, **m):\n    old(self, **m)\n"
        "    if (self.epoch, self.batches) == (1, 2): os.kill(os.getpid(), 9)\nvit.Run.log = log\n"
        f"sys.argv = {[*line, str(tmp_path / 'killed')]!r}\n"
        f"exec(compile(open({str(ROOT / 'ssl.py')!r}).read(), 'ssl.py', 'exec'), {{'__name__': '__main__'}})"
    )
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    assert vit.read_checkpoint(tmp_path / "killed/m.pt")["epoch"] == 1
    assert "going on after epoch 1 of 3" in call(*line, tmp_path / "killed")
    assert "finished before" in call(*line, tmp_path / "killed")
    call(*line, tmp_path / "whole")
    whole, killed = (vit.read_checkpoint(tmp_path / d / "m.pt") for d in ("whole", "killed"))
    assert whole["history"] == killed["history"]
    for name, value in whole["model"].items():
        assert torch.equal(value, killed["model"][name]), name


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    vit.write_file(tmp_path / "f", b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match="No space left"):
        vit.write_file(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old" and list(tmp_path.iterdir()) == [tmp_path / "f"]


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    with filelock.FileLock(tmp_path / ".lock"):
        assert "another run is working in" in call("analysis.py", "report", "--out", tmp_path, code=1)


def test_a_gpu_without_kernels_in_this_torch_is_left_alone(monkeypatch, capsys):
    """As an old card that CUDA lists: it fails at the first kernel. Asked for by name, it gets one
    sentence."""

    def zeros(*shape, device="cpu", zeros=torch.zeros):
        if device == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
        return zeros(*shape, device=device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", zeros)
    assert vit.set_up("auto", "float32").device.type == "cpu"
    assert "no kernel image" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="'cuda' can't be used here .*no kernel image.*try --device cpu"):
        vit.set_up("cuda", "float32")


def test_under_torchrun_a_gpu_that_is_not_there_ends_every_process_with_a_sentence(monkeypatch):
    """More processes than GPUs: a second one that went on on the CPU would let the first wait for ever."""

    def zeros(*shape, device="cpu", zeros=torch.zeros):
        if device == "cuda:1":
            raise RuntimeError("CUDA error: invalid device ordinal")
        return zeros(*shape, device="cpu")

    monkeypatch.setattr(vit, "PROCESSES", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(SystemExit, match="'cuda:1' can't be used here .*ordinal.*fewer processes"):
        vit.find_device("auto")


def test_float32_on_a_gpu_is_float32():
    """Not TF32, with 10 bits, which the rows would call float32, too."""
    assert "set_float32_matmul_precision" not in (ROOT / "vit.py").read_text()
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_disk_without_locks_is_worked_on_with_a_warning(tmp_path, monkeypatch):
    def acquire(*_, **__):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    text = call("analysis.py", "report", "--out", tmp_path, code=1)
    assert "knows no locks" in text and "no rows" in text


def test_a_stage_gives_its_folder_back_when_it_ends(tmp_path):
    """In a notebook, whose process lives on after %run."""
    call("analysis.py", "report", "--out", tmp_path, code=1)
    filelock.FileLock(tmp_path / ".lock").acquire(timeout=0)


def test_a_broken_results_file_gets_one_sentence(tmp_path):
    (tmp_path / "results.json").write_text('{"rows": {')
    assert "is no JSON any more" in call("analysis.py", "report", "--out", tmp_path, code=1)


def test_a_process_that_is_not_the_first_says_why_it_fails(tmp_path):
    second = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2"}
    assert "no training stage" in run("analysis.py", "report", "--out", tmp_path, code=1, env=second)


def test_progress_lines_fit_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr(vit.shutil, "get_terminal_size", lambda: os.terminal_size((80, 24)))
    monkeypatch.setattr(vit.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(vit.time, "perf_counter", iter([0.0, 2.0, 4.0]).__next__)
    progress = vit.Progress("pieces", 400)
    progress.done = 8
    progress.show("x" * 200)
    progress.advance(392)
    line = "400 of 400  100 pieces/s  0:00 left"
    assert capsys.readouterr().out == "\r" + "x" * 79 + "\r" + f"{line:<79}" + "\n"


@pytest.mark.parametrize("left, text", [(59.6, "1:00"), (0, "0:00"), (3599.7, "60:00"), (83, "1:23")])
def test_minutes_have_sixty_seconds(left, text, monkeypatch, capsys):
    monkeypatch.setattr(vit.time, "perf_counter", iter([0.0, 1.0]).__next__)
    progress = vit.Progress("pieces", 1 + left)
    progress.done = 1
    progress.show("tea", last=True)
    assert capsys.readouterr().out == f"tea  1 pieces/s  {text} left\n"


def test_help_works_without_docstrings():
    """In one process, as without them Python compiles all of torch anew."""
    program = """
import runpy, sys
for name in ("data.py", "ssl.py", "analysis.py"):
    sys.argv = [name, "--help"]
    try:
        runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        assert not end.code
"""
    assert run("-OO", "-c", program).count("usage:") == 3


@pytest.mark.parametrize(
    "content, message",
    [(None, "no checkpoint"), (b"not a checkpoint", "can't be read"), ("foreign", "can't be read")],
)
def test_missing_and_foreign_checkpoints_get_one_sentence(tmp_path, content, message):
    path = tmp_path / "c.pt"
    if content == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    elif content:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        vit.read_checkpoint(path)


def test_weights_of_a_network_that_was_edited_since_get_one_sentence(tmp_path):
    """A layer more, the first thing that a student tries."""
    edited = vit.ViT(32, 8, 32, depth=1)
    before = {"encoder." + name: x for name, x in edited.state_dict().items() if "norm2" not in name}
    state = {"model": before, "config": edited.config, "epoch": 1, "settings": {}}
    torch.save(state, tmp_path / "old.pt")
    with pytest.raises(SystemExit, match="another network .*blocks.0.norm2.weight.*--fresh"):
        vit.load_encoder(tmp_path / "old.pt")
    wider = nn.Linear(3, 2)
    with pytest.raises(SystemExit, match="another network .*size mismatch for weight"):
        vit.load_weights(wider, nn.Linear(4, 2).state_dict(), "old.pt")


def test_a_checkpoint_never_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"config": Evil(), "model": {}, "epoch": 1}, tmp_path / "c.pt")
    with pytest.raises(SystemExit, match="can't be read"):
        vit.read_checkpoint(tmp_path / "c.pt")
    assert not (tmp_path / "ran").exists()


def test_the_faster_precision_is_the_one_whose_product_takes_less_time(monkeypatch):
    """On a clock that we set: a product costs so many seconds in either precision. And the choice draws no
    random number."""
    cost, now = {torch.float32: 3.0, torch.bfloat16: 1.0}, [0.0]

    def product(a, b, matmul=torch.Tensor.__matmul__):
        result = matmul(a, b)
        now[0] += cost[result.dtype]
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    monkeypatch.setattr(vit.time, "thread_time", lambda: now[0])
    before = torch.get_rng_state()
    assert vit.faster_precision(torch.device("cpu")) == ("bfloat16", "3.0 times as fast as float32 here")
    cost[torch.bfloat16] = 75.0
    assert vit.faster_precision(torch.device("cpu")) == ("float32", "25.0 times as fast as bfloat16 here")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_gpu_takes_float32_every_time_and_autocast_is_left_alone(monkeypatch, device):
    """A trial chose now this, now that (4 of 20 starts on an H100): one run's rows would be of both.
    Not every device knows autocast, even disabled: MPS before macOS 14 raises TypeError."""
    monkeypatch.delattr(torch, "autocast")
    precision, _ = vit.faster_precision(torch.device(device))
    assert precision == "float32"
    with vit.Machine(torch.device("cpu"), precision, "", 0).autocast():
        torch.ones(2, 2) @ torch.ones(2, 2)


def test_choosing_the_precision_takes_less_than_a_third_of_a_second_and_leaves_the_threads_as_they_were():
    threads, start = torch.get_num_threads(), time.thread_time()
    vit.faster_precision(torch.device("cpu"))
    assert time.thread_time() - start < 0.3 and torch.get_num_threads() == threads


def test_a_device_that_is_not_there_gets_one_sentence(tmp_path):
    assert "can't be used here" in call("ssl.py", "finetune", "--device", "xpu:9", "--out", tmp_path, code=1)
