#!/usr/bin/env bash
# The whole experiment, top to bottom. Each stage prints its command, which you can type as it stands.
#
#   bash run_all.sh [quick|laptop|full|questions] [--data DIR] [--seed N] [--fresh]
#   bash run_all.sh test
#
# quick      every stage of laptop on 1,000 images, to see that it works; its numbers mean nothing
# laptop     all images, few epochs (the default without a CUDA GPU)
# full       the report's epochs and every control (the default with a CUDA GPU)
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
    -h|--help) sed -n '2,17s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) fail "don't know '$1'; $usage" ;;
  esac
  shift
done
cd "$(dirname "$0")"

# ---------------------------------------------------------------- set-up: an environment that has the requirements
has_all() { "$1" -m pip install -q --no-index --dry-run -r requirements.txt >/dev/null 2>&1; }  # needs no network
install() {
  echo "== set-up: installing requirements.txt into $2 (once; several GB)"
  "$1" -m pip install -q -r requirements.txt || fail "installing requirements.txt failed; the lines above say why"
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
SECONDS=0  # what follows is the experiment

# ---------------------------------------------------------------- profile, processes, images, folder
gpu="" default=laptop
if python -c 'import torch; print(torch.ones(1, device="cuda") + 1)' >/dev/null 2>&1; then gpu=yes default=full; fi
profile=${profile:-$default}
epochs_infonce=1 epochs_m=1 epochs_m_continued=1 epochs_m_joint=1 epochs_finetune=1  # quick
epochs_video=1 epochs_captioner=1 epochs_fusion=1 warmup=0.2 cutmix=0 cheaper="--frozen 4 --enlarge 40"
if [ $profile = laptop ]; then
  epochs_infonce=5 epochs_m=5 epochs_m_continued=2 epochs_m_joint=3 epochs_finetune=8 epochs_video=6 epochs_captioner=4
elif [ $profile = full ]; then
  epochs_infonce=20 epochs_m=20 epochs_m_continued=20 epochs_m_joint=20 epochs_finetune=50 epochs_video=25
  epochs_captioner=25 epochs_fusion=25 warmup=1 cutmix=0.5 cheaper=""  # CutMix pays in long training only
fi

NPROC=${NPROC:-1} train=python clips=python  # what starts the stages that train, and those that train on clips
if [ $NPROC != 1 ]; then
  train="torchrun --standalone --nproc_per_node=$NPROC"
  [ $((10 % NPROC)) != 0 ] || clips=$train  # 10 clips a step must be shared out evenly
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(python -c "import os; print(max(1, os.cpu_count() // $NPROC))")}
fi

if [ "$data" != synthetic ]; then
  printf '\n== the images\n$ python data.py --data %q\n' "$data"
  code=0; python data.py --data "$data" || code=$?
  if [ $code = 1 ] && [[ "$data" != */cifar-10-batches-bin ]] && [ ! -e "$data/cifar-10-batches-bin" ]; then
    data=synthetic
  elif [ $code != 0 ]; then
    exit $code  # damaged files, which are the user's to look at; Ctrl-C
  fi
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
timed=""
[ -e $out/results.json ] || [ -n "$questions" ] || timed=yes  # from nothing to the end
common=(--out $out --split test --seed $seed)
[ "$data" = data ] || common+=(--data "$data")
[ $profile != quick ] || common+=(--limit 1000)

stage() {  # stage "heading" command: prints both, runs the command with the options common to all
  printf '\n== %s\n$' "$1"; shift
  printf ' %q' "$@" "${common[@]}"; printf '\n'
  "$@" "${common[@]}"
}

# ---------------------------------------------------------------- stage 1: learning from images without labels
pretrain="$train ssl.py pretrain --task"
finetune="$train ssl.py finetune --cutmix $cutmix"
probe="python ssl.py probe --checkpoint"
stage "InfoNCE: two views of one image look alike" $pretrain infonce --epochs $epochs_infonce --keep-epochs
stage "Model M: name the angle, repaint the patches" $pretrain m --epochs $epochs_m
joint="--init $out/infonce.pt --contrast 1 --name m_joint"
stage "Model M continued, InfoNCE beside it" $pretrain m $joint --epochs $epochs_m_joint --keep-epochs
stage "linear probes; controls: raw pixels, an untrained ViT" $probe pixels untrained $out/{infonce,m,m_joint}.pt
stage "fine-tuning on labels" $finetune --checkpoint $out/m_joint.pt --epochs $epochs_finetune --keep-epochs
if [ $profile = full ] || [ -n "$questions" ]; then
  again="--init $out/infonce.pt --name"  # InfoNCE continued: by itself as long as m_joint, or by Model M alone
  stage "control: InfoNCE, longer" $pretrain infonce $again infonce_longer --epochs $epochs_m_joint
  stage "its linear probe" $probe $out/infonce_longer.pt
  longer="--checkpoint $out/infonce_longer.pt --epochs $epochs_finetune --name finetune_infonce_longer"
  stage "fine-tuning from it" $finetune $longer
  stage "Model M continued from InfoNCE" $pretrain m $again m_infonce --epochs $epochs_m_continued
  stage "its linear probe" $probe $out/m_infonce.pt
fi
if [ $profile = full ]; then  # costs as much again
  stage "control: the same training from scratch" $finetune --epochs $epochs_finetune
fi

# ---------------------------------------------------------------- stage 2: pseudo-videos
video="video.py --epochs $epochs_video --checkpoint $out/m_joint.pt"
# the report says: one clip a step, no loss but the clip's; the rest (learning rate, augmentation, smoothing) it leaves
# open, and its start is another Model M
report_clips="--frame-loss 0 --no-repeats --no-balanced"
train_as_the_report() {
  local once="python $video $report_clips --clips 1 --lr 1e-4"
  stage "the report's training: one clip a step" $once --blocks 1 --name video_report_1
  stage "the report's training, two blocks" $once --blocks 2 --name video_report_2
  stage "its image encoder, probed" $probe $out/video_report_1.pt
}
stage "factorised encoder, one temporal block" $clips $video --model encoder --blocks 1 --cutmix $cutmix
stage "factorised encoder, two temporal blocks" $clips $video --model encoder --blocks 2 --cutmix $cutmix
stage "the image encoder of the first, probed" $probe $out/video_encoder_1.pt
if [ $profile = full ]; then  # hours, without a GPU
  stage "factorised self-attention, one block" $clips $video --model divided --blocks 1 --cutmix $cutmix
  stage "factorised self-attention, two blocks" $clips $video --model divided --blocks 2 --cutmix $cutmix
  stage "control: without temporal positions" $clips $video --no-positions --name video_unordered --cutmix $cutmix
  train_as_the_report
fi

# ---------------------------------------------------------------- stage 3: language
captions_by() { stage "a caption for every image" python multimodal.py caption --captioner $1; }
captioner=blip
if [ -e $out/captions_blip.jsonl ]; then  # begun here, or brought from another machine
  captions_by blip
elif [ -z "$gpu" ] || ! captions_by blip; then  # without a GPU BLIP would take a night
  captioner=tiny
  stage "a small BLIP for each fold, a small CLIP, as the real ones can't be had here" \
    $train multimodal.py tiny --checkpoint $out/m_joint.pt --epochs $epochs_captioner $cheaper
  captions_by tiny
fi
captions=$out/captions_$captioner.jsonl
embed="python multimodal.py embed --captions"
fuse="$train multimodal.py fuse --epochs $epochs_fusion --warmup $warmup --cutmix $cutmix --captions"
stage "CLIP embeddings of the captions" $embed $captions
stage "fusion: the image asks, the caption answers; controls" $fuse $captions --control none image_only text_only
stage "fusion with attention over words" $fuse $captions --text tokens
if [ $profile = full ]; then
  stage "control: every caption from another image" $fuse $captions --control shuffled
  stage "fusion on the video model of one block" $fuse $captions --blocks 1
fi
if [ $profile = full ] && [ $captioner = tiny ]; then  # when a captioner describes images whose labels it has seen
  stage "captions by models that saw the labels" python multimodal.py caption --captioner tiny --seen
  stage "their embeddings" $embed $out/captions_tiny_seen.jsonl
  stage "control: fusion trained on them" $fuse $out/captions_tiny_seen.jsonl
fi

# ---------------------------------------------------------------- the questions that the report left open
if [ -n "$questions" ]; then
  # does pre-training pay, and with how many labels? (fewer labels get more epochs, but fewer steps)
  few="--labels 0.01 --epochs 50 --batch 32"
  some="--labels 0.1 --epochs 20"
  stage "from scratch, 1 % of the labels" $finetune $few --name finetune_scratch_1
  stage "and with 10 %" $finetune $some --name finetune_scratch_10
  stage "and with all" $finetune --epochs 8
  stage "all labels, fine-tuning Model M" $finetune --checkpoint $out/m.pt --epochs 8 --name finetune_m
  stage "all labels, fine-tuning InfoNCE" $finetune --checkpoint $out/infonce.pt --epochs 8 --name finetune_infonce
  stage "probes, 1 % of the labels" $probe untrained $out/{m,infonce,m_joint}.pt --labels 0.01
  stage "and with 10 %" $probe untrained $out/{m,infonce,m_joint}.pt --labels 0.1
  for start in m infonce m_joint; do
    tune="$finetune --checkpoint $out/$start.pt"
    stage "fine-tuning $start, 1 % of the labels" $tune $few --name finetune_${start}_1
    stage "and with 10 %" $tune $some --name finetune_${start}_10
  done

  # what does each half of Model M's task bring, and does its border betray a turned patch?
  variants=()
  for task in masking_0 rotation_0 rotation_1 both_1 image-rotation_0 image-rotation_1; do
    pretext="--pretext ${task%_*} --gap ${task#*_}"
    stage "Model M, its task changed: $task" $pretrain m $pretext --epochs $epochs_m --name m_$task
    variants+=($out/m_$task.pt)
  done
  stage "their linear probes" $probe "${variants[@]}"

  # is the 8x8 patch the limit?
  stage "from scratch, a convolution inside each patch" $finetune --epochs 8 --stem --name scratch_stem
  stage "from scratch, width 192 instead of 128" $finetune --epochs 8 --dim 192 --name scratch_dim192
  stage "from scratch, 64 patches of 4x4" $finetune --epochs 8 --patch 4 --name scratch_patch4

  # one temporal block or two, on the report's clips; and from there to our training (video_encoder_1), step by step
  train_as_the_report
  stage "ten clips a step" $clips $video $report_clips --name video_random
  stage "with every class in each step" $clips $video --frame-loss 0 --no-repeats --name video_balanced
  stage "of 1 to 16 different images" $clips $video --frame-loss 0 --name video_repeats
fi

# ---------------------------------------------------------------- what was learned
maps="python analysis.py maps cka --before $out/m_joint.pt --after $out/finetune.pt"
stage "where CLS looks, and what attention changes" $maps
stage "pictures, a moving picture, the table" python analysis.py figures movie report ${timed:+--seconds $SECONDS}
warn
