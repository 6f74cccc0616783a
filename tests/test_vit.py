"""The network against two independent implementations, and the promises of the plumbing."""

import argparse
import contextlib
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
    model = vit.ModelM(vit.ViT(dim=32, depth=1), projector=True).eval()
    _, pixels, z = model(images, masked)
    tokens = model.encoder(images)
    torch.testing.assert_close(pixels[1, 0], model.reconstruction_head(tokens[1, 1 + 15]))
    torch.testing.assert_close(z, model.projector(tokens[:, 0]))


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


# ------------------------------------------------------------------------------------------------------------


def arguments(out, **changed):
    defaults = dict(
        out=str(out), epochs=2, batch=8, lr=1e-3, warmup=1.0, weight_decay=0.1, fresh=False, keep_epochs=False
    )
    return argparse.Namespace(**defaults | changed)


def tiny_run(out, **changed):
    machine, encoder = vit.Machine("cpu", "float32", seed=1), vit.ViT(dim=16, depth=1)
    return vit.Run(arguments(out, **changed), "tiny", vit.Classifier(encoder), machine, encoder, 3)


def test_the_learning_rate_warms_up_then_falls_to_zero(tmp_path):
    run, rates = tiny_run(tmp_path, epochs=10, lr=1.0), []
    run.steps = 10  # of each of ten epochs, the first of which is the warm-up
    for run.epoch in range(10):
        for run.batches in range(10):
            run.set_learning_rate()
            rates.append(run.optimizer.param_groups[1]["lr"])
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0 and rates[99] < 0.001
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))


def test_decay_touches_matrices_only(tmp_path):
    run = tiny_run(tmp_path)
    names = {id(p): n for n, p in run.model.named_parameters()}
    decayed = {names[id(p)] for p in run.optimizer.param_groups[0]["params"]}
    assert {n for n in names.values() if n.endswith("weight") and "norm" not in n} == decayed
    assert run.optimizer.param_groups[1]["weight_decay"] == 0


def train(run, poison=None):
    for epoch in range(run.epoch, run.args.epochs):
        for k in range(3):
            images = torch.rand(8, 3, 32, 32, generator=run.generator)
            loss = run.model(images).square().mean()
            if (epoch, k) == poison:
                loss = loss * float("nan")
            loss.backward()
            run.set_learning_rate()
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.log(loss=loss)
        run.save()


def test_a_loss_that_is_not_finite_names_stage_and_epoch_and_keeps_the_last_good_epoch(tmp_path):
    with pytest.raises(SystemExit, match="tiny: the loss is not finite in epoch 2"):
        train(tiny_run(tmp_path), poison=(1, 2))
    state = vit.read_checkpoint(tmp_path / "tiny.pt")
    assert state["epoch"] == 1 and all(v.isfinite().all() for v in state["model"].values())


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
    train(tiny_run(tmp_path))
    with pytest.raises(SystemExit, match="tiny.pt was made with another lr: 0.001, not 1.0; add --fresh"):
        tiny_run(tmp_path, lr=1.0)
    with pytest.raises(SystemExit, match="another epochs: 2, not 3 .its learning rate falls to zero"):
        tiny_run(tmp_path, epochs=3)
    with pytest.raises(SystemExit, match="another checkpoint: None, not '[0-9a-f]{12}'; add --fresh"):
        tiny_run(tmp_path, checkpoint=tmp_path / "tiny.pt")
    assert tiny_run(tmp_path, lr=1.0, fresh=True).epoch == 0


def test_an_edited_file_is_noticed_and_one_that_is_not_loaded_is_not(tmp_path, monkeypatch, capsys):
    copy = shutil.copy(ROOT / "vit.py", tmp_path)
    monkeypatch.setattr(vit, "__file__", copy)
    train(tiny_run(tmp_path))
    (tmp_path / "other.py").write_text("x = 1")
    tiny_run(tmp_path)
    assert "finished before" in (text := capsys.readouterr().out) and "code has been" not in text
    (tmp_path / "vit.py").write_text("# a comment\n" + (ROOT / "vit.py").read_text())
    tiny_run(tmp_path)
    assert "finished before" in (text := capsys.readouterr().out) and "has been edited since: --fresh" in text
    assert tiny_run(tmp_path, fresh=True).epoch == 0
    state = torch.load(tmp_path / "tiny.pt", weights_only=True)
    torch.save({key: value for key, value in state.items() if key != "code"}, tmp_path / "tiny.pt")
    tiny_run(tmp_path)  # a checkpoint of before
    assert "finished before" in (text := capsys.readouterr().out) and "code has been" not in text


def test_a_killed_run_ends_with_the_same_weights_bit_for_bit(tmp_path):
    def stage(out, code=0, killer=""):
        body = (
            f"import sys, os, importlib.util; sys.path.insert(0, {str(ROOT)!r}); import torch, vit\n"
            f"{killer}\n"
            "sys.argv = 'ssl.py pretrain --task m --data synthetic --limit 128 --batch 32 --dim 32 --epochs "
            f"3 --device cpu --out {out}'.split()\n"
            f"exec(compile(open({str(ROOT / 'ssl.py')!r}).read(), 'ssl.py', 'exec'), "
            f"{{'__name__': '__main__'}})"
        )
        done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    kill_in_second_epoch = (
        "old = vit.Run.log\ndef log(self, **m):\n    old(self, **m)\n"
        "    if (self.epoch, self.batches) == (1, 2): os.kill(os.getpid(), 9)\nvit.Run.log = log"
    )
    stage("whole")
    stage("killed", code=-signal.SIGKILL, killer=kill_in_second_epoch)
    assert vit.read_checkpoint(tmp_path / "killed/m.pt")["epoch"] == 1
    assert "going on after epoch 1 of 3" in stage("killed")
    assert "finished before" in stage("killed")
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
    assert vit.Machine("auto", "float32").device.type == "cpu"
    assert "no kernel image" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="'cuda' can't be used here .*no kernel image.*try --device cpu"):
        vit.Machine("cuda", "float32")


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


@pytest.mark.parametrize("name", ["data.py", "ssl.py", "analysis.py"])
def test_help_works_without_docstrings(name):
    run("-OO", name, "--help")


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


@pytest.mark.parametrize("error", [TypeError, RuntimeError, NotImplementedError])
def test_where_bfloat16_does_not_work_float32_is_taken(monkeypatch, error):
    """As MPS before macOS 14 (TypeError) and GPUs without it (RuntimeError)."""

    def autocast(*_, enabled, **__):
        if enabled:
            raise error("not here")
        return contextlib.nullcontext()

    monkeypatch.setattr(torch, "autocast", autocast)
    assert vit.faster_precision(torch.device("cpu")) == ("float32", "bfloat16 does not work here")
    with vit.Machine("cpu").autocast():  # and autocast is left alone from then on
        torch.ones(2, 2) @ torch.ones(2, 2)


def test_choosing_the_precision_takes_less_than_a_third_of_a_second_and_leaves_the_threads_as_they_were():
    threads, start = torch.get_num_threads(), time.thread_time()
    vit.faster_precision(torch.device("cpu"))
    assert time.thread_time() - start < 0.3 and torch.get_num_threads() == threads


def test_a_device_that_is_not_there_gets_one_sentence(tmp_path):
    assert "can't be used here" in call("ssl.py", "finetune", "--device", "xpu:9", "--out", tmp_path, code=1)
