#!/usr/bin/env bash
# The whole experiment, top to bottom. Each stage prints its command, to be typed as it stands (after:
# source .venv/bin/activate).
#
#   bash run_all.sh [quick|laptop|full|questions] [--data DIR] [--seed N] [--fresh]
#   bash run_all.sh test
#
# quick      every stage of laptop on 1,000 images, to see that it works; its numbers mean nothing
# laptop     all images, few epochs (the default without a CUDA GPU)
# full       the report's number of epochs, and every control (the default with a CUDA GPU)
# questions  laptop, then what the report left open
# test       the tests
#
# --data synthetic takes drawn shapes instead of CIFAR-10, and so does a run that finds no CIFAR-10 and no network.
# NPROC=2 bash run_all.sh ... trains with so many processes, one per GPU (torchrun); the results stay the same.
# A finished stage is skipped, an interrupted one goes on where it was: after any accident type the same again
# (without --fresh).
set -euo pipefail

fail() { echo "run_all.sh: $*" >&2; exit 2; }
usage="usage: bash run_all.sh [quick|laptop|full|questions|test] [--data DIR] [--seed N] [--fresh]"

profile="" questions="" fresh="" data=data seed=0
while [ $# -gt 0 ]; do
  case "$1" in
    quick|laptop|full|test) profile=$1 ;;
    questions) profile=laptop questions=yes ;;
    --data)
      [ $# -ge 2 ] || fail "--data needs a folder; $usage"
      shift; data=$1
      [ "$1" = synthetic ] || data=$(cd "$1" >/dev/null 2>&1 && pwd) || fail "there is no folder $1" ;;
    --seed) [[ "${2:-}" =~ ^[0-9]+$ ]] || fail "--seed needs a number; $usage"; shift; seed=$1 ;;
    --fresh) fresh=yes ;;
    -h|--help) sed -n '2,18s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) fail "don't know '$1'; $usage" ;;
  esac
  shift
done
cd "$(dirname "$0")"

# ---------------------------------------------------------------- set-up: an environment that has the requirements
has_all() {  # without pip, which an environment made by uv has not
  "$1" -c 'import re
from importlib.metadata import version
for line in open("requirements.txt"):
    name, least = line.strip().split(">=")
    assert [int(n) for n in re.findall("[0-9]+", version(name))] >= [int(n) for n in least.split(".")]
' >/dev/null 2>&1
}
install() {
  echo "== set-up: installing requirements.txt into $2 (once; several GB)"
  PIP_USER=0 "$1" -m pip install -q -r requirements.txt ||
    fail "installing requirements.txt failed; the lines above say why"
}
system=${PYTHON:-python3}
if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && has_all python; then
  :  # an active environment that has everything
elif "$system" -c 'import google.colab' 2>/dev/null || [ -n "${KAGGLE_KERNEL_RUN_TYPE:-}" ]; then
  has_all "$system" || install "$system" "this notebook's environment"  # there no .venv can be made
else
  if ! has_all .venv/bin/python; then
    "$system" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
      fail "Python 3.10 or newer is needed; $system is $("$system" --version 2>&1);" \
        "PYTHON=python3.12 bash run_all.sh ... names another one"
    .venv/bin/python -m pip --version >/dev/null 2>&1 || "$system" -m venv .venv ||  # none, or half made: no pip in it
      fail "$system -m venv does not work here (on Debian: apt install python3-venv)"
    install .venv/bin/python .venv
  fi
  export PATH="$PWD/.venv/bin:$PATH"
fi
if [ "$profile" = test ]; then exec python -m pytest -q tests; fi

# ---------------------------------------------------------------- profile, processes, images, folder
gpu="" default=laptop
if python -c 'import torch; print(torch.ones(1, device="cuda") + 1)' >/dev/null 2>&1; then gpu=yes default=full; fi
profile=${profile:-$default}
case $profile in
  quick)
    epochs_infonce=1 epochs_m=1 epochs_continued=1 epochs_finetune=1 epochs_video=1 epochs_captioner=1 epochs_fusion=1
    cutmix=0 frozen=4 enlarge=40 ;;  # a cheaper captioner: frozen blocks, smaller images
  laptop)  # chosen on validation images: results/tuning.md
    epochs_infonce=3 epochs_m=3 epochs_continued=1 epochs_finetune=6 epochs_video=4 epochs_captioner=2 epochs_fusion=1
    cutmix=0 frozen=4 enlarge=40 ;;
  full)  # the report's for Model M, fine-tuning and clips; it names none for InfoNCE and captions
    epochs_infonce=20 epochs_m=20 epochs_continued=20 epochs_finetune=50 epochs_video=25 epochs_captioner=25 epochs_fusion=25
    cutmix=0.5 frozen=0 enlarge=48 ;;  # CutMix is meant for long training
esac

NPROC=${NPROC:-1} train=python clips=python  # what starts the stages that train, and those that train on clips
if [ $NPROC != 1 ]; then
  # by number, as some machines can't look up their own name
  train="torchrun --standalone --local-addr=127.0.0.1 --nproc_per_node=$NPROC"
  [ $((10 % NPROC)) != 0 ] || clips=$train  # 10 clips a step must be shared out evenly
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(python -c "import os; print(max(1, os.cpu_count() // $NPROC))")}
fi

if [ "$data" != synthetic ]; then
  printf '\n== the images\n$ python data.py --data %q\n' "$data"
  code=0; python data.py --data "$data" || code=$?
  case $code in
    0) ;;
    3) data=synthetic ;;  # no network
    *) exit $code ;;  # damaged files, which are the user's to look at; a full disk; Ctrl-C
  esac
fi
[ "$data" = synthetic ] && dataset=synthetic || dataset=cifar10
warn() {
  local shapes="NO CIFAR-10: THIS RUN USES SYNTHETIC SHAPES. ITS NUMBERS ARE NOT CIFAR-10 NUMBERS."
  local quick="QUICK: A FEW IMAGES, ONE EPOCH, TO SEE THAT EVERYTHING WORKS. ITS NUMBERS MEAN NOTHING."
  [ $dataset = cifar10 ] || printf '\n**** %s ****\n' "$shapes"
  [ $profile != quick ] || printf '\n**** %s ****\n' "$quick"
}
warn

out=runs/$dataset-$profile
[ "$seed" = 0 ] || out+=-seed$seed
mkdir -p $out
exec 9>$out/.run_all.lock  # held until this script and all it started have ended, however they end
python -c 'import fcntl, sys
try: fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError: sys.exit(1)
except OSError as error: print(f"no locks on this disk ({error.strerror}): do not start two runs in one folder")
' || fail "another run_all.sh is working in $out; wait for it or stop it"
[ -z "$fresh" ] || rm -rf $out/*
common=(--out $out --split test --seed $seed)
[ -z "$gpu" ] || common+=(--device cuda)  # by name: a GPU that is full for a moment must not mean hours on the CPU
[ "$data" = data ] || common+=(--data "$data")
[ $profile != quick ] || common+=(--limit 1000)

stage() {  # stage "heading" command: prints both, runs the command with the options common to all
  printf '\n== %s\n$' "$1"; shift
  printf ' %q' "$@" "${common[@]}"; printf '\n'
  "$@" "${common[@]}"
}

# ---------------------------------------------------------------- stage 1: learning from images without labels
stage "InfoNCE: two views of one image look alike" \
  $train ssl.py pretrain --task infonce --epochs $epochs_infonce --keep-epochs
stage "Model M: name the angle, repaint the patches" \
  $train ssl.py pretrain --task m --epochs $epochs_m
stage "Model M continued, InfoNCE beside it" \
  $train ssl.py pretrain --task m --contrast 1 --init $out/infonce.pt --epochs $epochs_continued --name m_joint --keep-epochs
stage "linear probes; controls: raw pixels, an untrained ViT" \
  python ssl.py probe --checkpoint pixels untrained $out/{infonce,m,m_joint}.pt
stage "fine-tuning on labels" \
  $train ssl.py finetune --checkpoint $out/m_joint.pt --epochs $epochs_finetune --cutmix $cutmix --keep-epochs
if [ $profile = full ] || [ -n "$questions" ]; then
  # InfoNCE continued: by itself as long as m_joint, or by Model M alone, as the report's Model M was
  stage "control: InfoNCE, longer" \
    $train ssl.py pretrain --task infonce --init $out/infonce.pt --epochs $epochs_continued --name infonce_longer
  stage "its linear probe" python ssl.py probe --checkpoint $out/infonce_longer.pt
  stage "fine-tuning from it" $train ssl.py finetune --checkpoint $out/infonce_longer.pt \
    --epochs $epochs_finetune --cutmix $cutmix --name finetune_infonce_longer
  stage "Model M continued from InfoNCE" \
    $train ssl.py pretrain --task m --init $out/infonce.pt --epochs $epochs_continued --name m_infonce
  stage "its linear probe" python ssl.py probe --checkpoint $out/m_infonce.pt
  stage "fine-tuning from it" $train ssl.py finetune --checkpoint $out/m_infonce.pt \
    --epochs $epochs_finetune --cutmix $cutmix --name finetune_m_infonce
  stage "control: the same training from scratch" $train ssl.py finetune --epochs $epochs_finetune --cutmix $cutmix
fi

# ---------------------------------------------------------------- stage 2: pseudo-videos
train_as_the_report() {
  # the report says: one clip a step, no loss but the clip's; the rest (optimiser, learning rate, augmentation,
  # smoothing) it leaves open, and its start is another Model M. AdamW is the likeliest guess; its learning rate: a
  # tenth of the usual one, as a step sees a tenth of the images
  for blocks in 1 2; do
    stage "the report's training: one clip a step; temporal blocks: $blocks" \
      python video.py --checkpoint $out/m_joint.pt --blocks $blocks --clips 1 --frame-loss 0 --no-repeats --no-balanced \
      --optimizer adamw --lr 1e-4 --epochs $epochs_video --name video_report_$blocks
  done
  stage "the image encoder of the first, probed" python ssl.py probe --checkpoint $out/video_report_1.pt
}
stage "factorised encoder, one temporal block" \
  $clips video.py --checkpoint $out/m_joint.pt --model encoder --blocks 1 --epochs $epochs_video --cutmix $cutmix
stage "factorised encoder, two temporal blocks" \
  $clips video.py --checkpoint $out/m_joint.pt --model encoder --blocks 2 --epochs $epochs_video --cutmix $cutmix
stage "the image encoder of the first, probed" python ssl.py probe --checkpoint $out/video_encoder_1.pt
if [ $profile = full ]; then  # hours, without a GPU
  stage "factorised self-attention, one block" \
    $clips video.py --checkpoint $out/m_joint.pt --model divided --blocks 1 --epochs $epochs_video --cutmix $cutmix
  stage "factorised self-attention, two blocks" \
    $clips video.py --checkpoint $out/m_joint.pt --model divided --blocks 2 --epochs $epochs_video --cutmix $cutmix
  stage "control: without temporal positions" \
    $clips video.py --checkpoint $out/m_joint.pt --no-positions --epochs $epochs_video --cutmix $cutmix --name video_unordered
  train_as_the_report
fi

# ---------------------------------------------------------------- stage 3: language
captioner=blip
if [ ! -e $out/captions_blip.jsonl ] && [ -z "$gpu" ]; then  # neither begun here, nor brought from another machine
  captioner=tiny  # without a GPU BLIP would take a night
else
  code=0; stage "a caption for every image" python multimodal.py caption --captioner blip || code=$?
  case $code in
    0) ;;
    3) captioner=tiny ;;  # BLIP can't be had; every other failure is one
    *) exit $code ;;
  esac
fi
if [ $captioner = tiny ]; then
  stage "a small BLIP for each fold, a small CLIP, in place of the real ones" \
    $train multimodal.py tiny --checkpoint $out/m_joint.pt --epochs $epochs_captioner --frozen $frozen --enlarge $enlarge
  stage "a caption for every image" python multimodal.py caption --captioner tiny
fi
captions=$out/captions_$captioner.jsonl
stage "CLIP embeddings of the captions" python multimodal.py embed --captions $captions
stage "fusion: the image asks, the caption answers; controls" $train multimodal.py fuse --captions $captions \
  --control none image_only text_only --epochs $epochs_fusion --cutmix $cutmix
stage "fusion with attention over words" $train multimodal.py fuse --captions $captions \
  --text tokens --epochs $epochs_fusion --cutmix $cutmix
if [ $profile = full ] || [ -n "$questions" ]; then
  stage "control: every caption from another image" $train multimodal.py fuse --captions $captions \
    --control shuffled --epochs $epochs_fusion --cutmix $cutmix
  stage "fusion on the video model of one block" $train multimodal.py fuse --captions $captions \
    --blocks 1 --epochs $epochs_fusion --cutmix $cutmix
fi
if [ $profile = full ] && [ $captioner = tiny ]; then  # when a captioner describes images whose labels it has seen
  stage "captions by models that saw the labels" python multimodal.py caption --captioner tiny --seen
  stage "their embeddings" python multimodal.py embed --captions $out/captions_tiny_seen.jsonl
  stage "control: fusion trained on them" $train multimodal.py fuse --captions $out/captions_tiny_seen.jsonl \
    --epochs $epochs_fusion --cutmix $cutmix
fi

# ---------------------------------------------------------------- the questions that the report left open
if [ -n "$questions" ]; then
  # what does the optimiser bring? (its other half is above: infonce, finetune, finetune_scratch)
  stage "InfoNCE by AdamW" \
    $train ssl.py pretrain --task infonce --optimizer adamw --epochs $epochs_infonce --name infonce_adamw
  stage "its linear probe" python ssl.py probe --checkpoint $out/infonce_adamw.pt
  stage "fine-tuning by AdamW" $train ssl.py finetune --checkpoint $out/m_joint.pt --optimizer adamw \
    --epochs $epochs_finetune --cutmix $cutmix --name finetune_adamw
  stage "from scratch by AdamW" \
    $train ssl.py finetune --optimizer adamw --epochs $epochs_finetune --cutmix $cutmix --name finetune_scratch_adamw

  # one temporal block or two, on the report's clips; and from there to our training (video_encoder_1), step by step
  train_as_the_report
  # a tenth of the learning rate, as a step sees a tenth of the images
  stage "our optimiser" python video.py --checkpoint $out/m_joint.pt --clips 1 --frame-loss 0 --no-repeats --no-balanced \
    --lr 4e-4 --epochs $epochs_video --name video_muon
  stage "ten clips a step" $clips video.py --checkpoint $out/m_joint.pt --frame-loss 0 --no-repeats --no-balanced \
    --epochs $epochs_video --name video_random
  stage "with every class in each step" $clips video.py --checkpoint $out/m_joint.pt --frame-loss 0 --no-repeats \
    --epochs $epochs_video --name video_balanced
  stage "of 1 to 16 different images" $clips video.py --checkpoint $out/m_joint.pt --frame-loss 0 \
    --epochs $epochs_video --name video_repeats

  # does pre-training pay, and with how many labels? (few or some: about 700 steps; all labels: 2,100)
  few="--labels 0.01 --epochs 50 --batch 32"
  some="--labels 0.1 --epochs 20"
  stage "from scratch, 1 % of the labels" $train ssl.py finetune $few --cutmix 0 --name finetune_scratch_1
  stage "and with 10 %" $train ssl.py finetune $some --cutmix 0 --name finetune_scratch_10
  for start in m infonce infonce_longer m_joint; do
    stage "fine-tuning $start, 1 % of the labels" \
      $train ssl.py finetune --checkpoint $out/$start.pt $few --cutmix 0 --name finetune_${start}_1
    stage "and with 10 %" $train ssl.py finetune --checkpoint $out/$start.pt $some --cutmix 0 --name finetune_${start}_10
  done
  for start in m infonce; do
    stage "fine-tuning $start, all labels" \
      $train ssl.py finetune --checkpoint $out/$start.pt --epochs $epochs_finetune --cutmix 0 --name finetune_$start
  done
  for labels in 0.01 0.1; do
    stage "probes with that share of the labels: $labels" \
      python ssl.py probe --checkpoint pixels untrained $out/{m,infonce,infonce_longer,m_joint}.pt --labels $labels
  done

  # what does each half of Model M's task bring, and does its border betray a turned patch?
  for pretext in masking rotation image-rotation; do
    stage "Model M, $pretext only" \
      $train ssl.py pretrain --task m --pretext $pretext --epochs $epochs_m --name m_${pretext}_0
  done
  for pretext in rotation image-rotation both; do
    stage "Model M, $pretext, with a gap" \
      $train ssl.py pretrain --task m --pretext $pretext --gap 1 --epochs $epochs_m --name m_${pretext}_1
  done
  stage "their linear probes" \
    python ssl.py probe --checkpoint $out/m_{masking_0,rotation_0,image-rotation_0,rotation_1,image-rotation_1,both_1}.pt

  # is the 8x8 patch the limit?
  stage "from scratch, a convolution inside each patch" \
    $train ssl.py finetune --stem --epochs $epochs_finetune --cutmix 0 --name scratch_stem
  stage "from scratch, width 192 instead of 128" \
    $train ssl.py finetune --dim 192 --epochs $epochs_finetune --cutmix 0 --name scratch_dim192
  stage "from scratch, 64 patches of 4x4" \
    $train ssl.py finetune --patch 4 --epochs $epochs_finetune --cutmix 0 --name scratch_patch4
fi

# ---------------------------------------------------------------- what was learned
stage "where CLS looks, and what attention changes" \
  python analysis.py maps cka --before $out/m_joint.pt --after $out/finetune.pt
stage "pictures, a moving picture, the table" python analysis.py figures movie report
warn
