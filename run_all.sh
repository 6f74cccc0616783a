#!/usr/bin/env bash
# The whole experiment, top to bottom. Each stage prints its command, to be typed as it stands (after:
# source .venv/bin/activate).
#
#   bash run_all.sh [quick|laptop|full] [--data DIR] [--seed N] [--fresh]
#   bash run_all.sh test
#
# quick    every stage on 500 images, one epoch each, to see that it works; its numbers mean nothing
# laptop   all images, few epochs (the default without a CUDA GPU)
# full     the report's number of epochs (the default with a CUDA GPU)
# test     the tests
#
# --data synthetic takes drawn shapes instead of CIFAR-10, and so does a run that finds no CIFAR-10 and no network.
# NPROC=2 bash run_all.sh ... trains with two processes, one per GPU (torchrun); the same but for what chance does.
# A finished stage is not trained again, an interrupted one goes on where it was: after any accident type the same
# again (without --fresh, which empties the run's folder first).
set -euo pipefail

fail() { echo "run_all.sh: $*" >&2; exit 2; }
usage="usage: bash run_all.sh [quick|laptop|full|test] [--data DIR] [--seed N] [--fresh]"

profile="" fresh="" data=data seed=0
while [ $# -gt 0 ]; do
  case "$1" in
    quick|laptop|full|test) profile=$1 ;;
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

# ---------------------------------------------------------------- set-up: the active Python if it has everything, else .venv
has_all() {  # without pip, which an environment made by uv has not
  "$1" -c 'import re, sys
from importlib.metadata import version
for line in open("requirements.txt"):
    name, least = line.strip().split(">=")
    if [int(n) for n in re.findall("[0-9]+", version(name))] < [int(n) for n in least.split(".")]:
        sys.exit(1)
' >/dev/null 2>&1
}
if ! has_all python; then
  system=${PYTHON:-python3}
  if ! has_all .venv/bin/python; then
    "$system" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
      fail "Python 3.10 or newer is needed; PYTHON=python3.12 bash run_all.sh ... names another one than $system"
    .venv/bin/python -m pip --version >/dev/null 2>&1 || "$system" -m venv .venv ||  # none, or half made: no pip in it
      fail "$system -m venv does not work here (on Debian: apt install python3-venv; in a notebook:" \
        "pip install -r requirements.txt, then type this again)"
    echo "== set-up: installing requirements.txt into .venv (once; several GB)"
    .venv/bin/python -m pip install -q -r requirements.txt || fail "installing failed; the lines above say why"
  fi
  export PATH="$PWD/.venv/bin:$PATH"
fi
enc=${PYTHONIOENCODING:-}; export PYTHONIOENCODING=${enc%%:*}:replace  # a terminal that can't show a letter shows a question mark
if [ "$profile" = test ]; then exec python -m pytest -q tests; fi

# ---------------------------------------------------------------- profile, images, folder
gpu="" default=laptop
if python -c 'import torch; print(torch.ones(1, device="cuda") + 1)' >/dev/null 2>&1; then gpu=yes default=full; fi
profile=${profile:-$default}
case $profile in
  quick)  infonce=1 m=1 finetune=1 clips=1 captioner=1 fusion=1 frozen=4 enlarge=40 cutmix= ;;
  laptop) infonce=4 m=3 finetune=6 clips=4 captioner=2 fusion=1 frozen=4 enlarge=40 cutmix= ;;
  # the report's epochs for Model M, fine-tuning and clips; it names none for InfoNCE and captions. CutMix, since
  # in 50 epochs the network otherwise learns its training images by heart (results/tuning.md)
  full)   infonce=40 m=20 finetune=50 clips=25 captioner=25 fusion=4 frozen=0 enlarge=48 cutmix=--cutmix ;;
esac
case ${NPROC:-1} in  # what starts the stages that train; the address by number, as some machines don't know their name
  1) train=python ;;
  2) train="torchrun --standalone --local-addr=127.0.0.1 --nproc_per_node=2" ;;
  *) fail "NPROC must be 1 or 2: batches of 128 images and 10 clips are shared out evenly" ;;
esac

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
[ -z "$fresh" ] || rm -rf "$out"
mkdir -p $out
common=(--out $out --split test --seed $seed)
[ -z "$gpu" ] || common+=(--device cuda)  # by name: a GPU that is full for a moment must not mean hours on the CPU
[ "$data" = data ] || common+=(--data "$data")
[ $profile != quick ] || common+=(--limit 500)
echo "# commit $(git describe --always --dirty 2>/dev/null || echo unknown)" > $out/commands.txt

stage() {  # stage "heading" command: prints both, runs the command with the options common to all
  printf '\n== %s\n' "$1"; shift
  local typed; typed=$(printf ' %q' "$@" "${common[@]}"); typed=${typed# }
  echo "$ $typed"
  echo "$typed" >> $out/commands.txt
  "$@" "${common[@]}"
}

# ---------------------------------------------------------------- stage 1: learning from images without labels
stage "InfoNCE: two views of one image look alike" \
  $train ssl.py pretrain --task infonce --epochs $infonce --keep-epochs
stage "Model M goes on from it: name the angle, repaint the patches" \
  $train ssl.py pretrain --task m --init $out/infonce.pt --epochs $m --keep-epochs
stage "control: Model M without InfoNCE" \
  $train ssl.py pretrain --task m --epochs $m --name m_alone
stage "linear probes; controls: raw pixels, an untrained ViT" \
  python ssl.py probe --checkpoint pixels untrained $out/{infonce,m,m_alone}.pt
stage "fine-tuning Model M on labels" \
  $train ssl.py finetune --checkpoint $out/m.pt --epochs $finetune $cutmix --keep-epochs
stage "control: fine-tuning from InfoNCE, without Model M" \
  $train ssl.py finetune --checkpoint $out/infonce.pt --epochs $finetune $cutmix --name finetune_infonce
stage "control: the same training from scratch" $train ssl.py finetune --epochs $finetune $cutmix
stage "where CLS looks, and what attention changes" python analysis.py maps cka

# ---------------------------------------------------------------- stage 2: pseudo-videos
for blocks in 1 2; do
  stage "clips alone, as the report trains; temporal blocks: $blocks" \
    $train video.py --checkpoint $out/m.pt --blocks $blocks --epochs $clips --frame-loss 0 --name clips_$blocks
  stage "clips, and each of their images by itself; temporal blocks: $blocks" \
    $train video.py --checkpoint $out/m.pt --blocks $blocks --epochs $clips
done
if [ $profile = full ]; then
  stage "factorised self-attention" \
    $train video.py --checkpoint $out/m.pt --model divided --blocks 2 --epochs $clips
fi

# ---------------------------------------------------------------- stage 3: language
captioner_is=blip
if [ ! -e $out/captions_blip.json ] && [ -z "$gpu" ]; then  # neither begun here, nor brought from another machine
  captioner_is=tiny  # without a GPU BLIP would take a night
else
  code=0; stage "a caption for every image" python multimodal.py caption --captioner blip || code=$?
  case $code in
    0) ;;
    3) captioner_is=tiny ;;  # BLIP can't be had; every other failure is one
    *) exit $code ;;
  esac
fi
if [ $captioner_is = tiny ]; then
  stage "a small BLIP for each fold, a small CLIP, in place of the real ones" \
    $train multimodal.py tiny --checkpoint $out/m.pt --epochs $captioner --frozen $frozen --enlarge $enlarge
  stage "a caption for every image" python multimodal.py caption --captioner tiny
fi
captions=$out/captions_$captioner_is.json
stage "CLIP embeddings of the captions" python multimodal.py embed --captions $captions
stage "fusion: the image asks, the caption answers; controls" \
  $train multimodal.py fuse --captions $captions --epochs $fusion --control none image_only text_only shuffled
stage "fusion with attention over words" \
  $train multimodal.py fuse --captions $captions --epochs $fusion --text tokens

# ---------------------------------------------------------------- what came out
stage "pictures" python results/draw.py
stage "the table" python results/table.py
warn
