#!/usr/bin/env bash
# The whole experiment, top to bottom. Each stage prints its command, which you can type as it stands.
#
#   bash run_all.sh [quick|laptop|full|questions] [--data DIR] [--seed N] [--fresh]     default: full with a CUDA GPU, else laptop
#   bash run_all.sh test                                                                the tests (about three minutes)
#
# quick: a few thousand images, to see that everything works      laptop: all images, few epochs
# full: the report's epochs, every control                        questions: laptop, then what the report left open
#
# NPROC=2 bash run_all.sh ... trains with so many processes, one per GPU (torchrun); the results stay the same.
# A finished stage is skipped and an interrupted one goes on where it was, so after any accident type the same again (without --fresh).
set -euo pipefail

fail() { echo "run_all.sh: $*" >&2; exit 2; }
usage="usage: bash run_all.sh [quick|laptop|full|questions|test] [--data DIR] [--seed N] [--fresh]"

profile="" questions="" from_nothing="" data="" seed=0 fresh=""
while [ $# -gt 0 ]; do
  case "$1" in
    quick|laptop|full|test) profile=$1 ;;
    questions) profile=laptop questions=yes ;;
    --data) [ $# -ge 2 ] || fail "--data needs a folder; $usage"
            shift; [ "$1" = synthetic ] && data=synthetic || data=$(cd "$1" >/dev/null 2>&1 && pwd) || fail "there is no folder $1" ;;
    --seed) [[ "${2:-}" =~ ^[0-9]+$ ]] || fail "--seed needs a number; $usage"; seed=$2; shift ;;
    --fresh) fresh=yes ;;
    -h|--help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) fail "don't know '$1'; $usage" ;;
  esac
  shift
done
cd "$(dirname "$0")"

# ---------------------------------------------------------------- set-up: an environment that has the requirements
# Says whether the Python named first has every package of requirements.txt in an allowed version.
satisfied() {
  "$1" - 2>/dev/null <<'PY'
import re, sys
from importlib.metadata import version
if sys.version_info < (3, 10): sys.exit(1)
for line in open("requirements.txt"):
    name, least = line.split("#")[0].strip().split(">=")
    number = lambda text: [int(n) for n in re.findall(r"\d+", text)[:2]] + [0] * (2 - len(re.findall(r"\d+", text)[:2]))
    if number(version(name)) < number(least): sys.exit(1)
PY
}

if { [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || python3 -c 'import google.colab' 2>/dev/null; } && satisfied python; then
  :  # an active environment, or Colab, that has everything
else
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "Python 3.10 or newer is needed, as python3; this one is $(python3 --version 2>&1)"
  if ! satisfied .venv/bin/python; then
    # a .venv without pip is half made: Debian's Python leaves one where python3-venv is missing
    .venv/bin/python -m pip --version >/dev/null 2>&1 || { echo "== set-up: making .venv"; python3 -m venv .venv || fail "python3 -m venv does not work here; install Python 3.10 or newer (Debian: apt install python3-venv)"; }
    echo "== set-up: installing requirements.txt into .venv (once; several GB)"
    .venv/bin/python -m pip install -q -r requirements.txt || fail "installing requirements.txt failed; the lines above say why"
  fi
  export PATH="$PWD/.venv/bin:$PATH"
fi

if [ "$profile" = test ]; then exec python -m pytest -q tests; fi

# ---------------------------------------------------------------- the profile, the data
[ -n "$profile" ] || { python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && profile=full || profile=laptop; }
case "$profile" in  # epochs of InfoNCE, of Model M from scratch, continued, continued jointly; of fine-tuning; on clips;
                    # of the small captioners, of fusion
  quick)  infonce=2;  m=2;  more=2;  joint=2;  tune=2;  film=1;  talk=2;  join=1;  cutmix=0 ;;
  laptop) infonce=5;  m=5;  more=2;  joint=3;  tune=8;  film=6;  talk=6;  join=2;  cutmix=0 ;;  # CutMix pays in long training only
  full)   infonce=20; m=20; more=20; joint=20; tune=50; film=25; talk=25; join=25; cutmix=0.5 ;;
esac

NPROC=${NPROC:-1} train=python clips=python  # what starts the stages that train, and those that train on clips
if [ "$NPROC" != 1 ]; then
  train="torchrun --standalone --nproc_per_node=$NPROC"
  [ $((10 % NPROC)) != 0 ] || clips=$train  # 10 clips a step must be shared out evenly
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(python -c "import os; print(max(1, os.cpu_count() // $NPROC))")}
fi

stage() {  # stage "heading" command: prints both, runs the command
  printf '\n== %s\n$' "$1"; shift; printf ' %q' "$@"; printf '\n'
  "$@"
}

where=${data:-data}
if [ "$where" != synthetic ]; then
  code=0; stage "the images" python data.py --data "$where" || code=$?
  [ $code -le 1 ] || exit $code  # Ctrl-C
  if [ $code = 1 ]; then
    case "$where" in */cifar-10-batches-bin) exit 1 ;; esac
    [ ! -e "$where/cifar-10-batches-bin" ] || exit 1  # damaged files are the user's to look at
    where=synthetic
  fi
fi
[ "$where" = synthetic ] && dataset=synthetic || dataset=cifar10
warn() { [ "$dataset" != synthetic ] || printf '\n**** NO CIFAR-10: THIS RUN USES SYNTHETIC SHAPES. ITS NUMBERS ARE NOT CIFAR-10 NUMBERS. ****\n'; }
warn

out=runs/$dataset-$profile
[ "$seed" = 0 ] || out+=-seed$seed
mkdir -p "$out"
exec 9>"$out/.run_all.lock"  # held until this script and all it started have ended, however they end
python -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null || fail "another run_all.sh is working in $out; wait for it or stop it"
[ -z "$fresh" ] || rm -rf "$out"/*
[ -e "$out/results.json" ] || [ -n "$questions" ] || from_nothing=yes
common=(--out "$out" --split test --seed "$seed")
[ "$where" = data ] || common+=(--data "$where")
[ "$profile" != quick ] || common+=(--limit 3000)

# ---------------------------------------------------------------- stage 1: learning from images without labels
stage "control: a linear layer on raw pixels"          python ssl.py probe --checkpoint pixels "${common[@]}"
stage "control: a linear probe of an untrained ViT"    python ssl.py probe --checkpoint untrained "${common[@]}"
stage "InfoNCE: two views of one image look alike"     $train ssl.py pretrain --task infonce --epochs $infonce --keep-epochs "${common[@]}"
stage "linear probe of the InfoNCE encoder"            python ssl.py probe --checkpoint "$out/infonce.pt" "${common[@]}"
stage "Model M: name the angle, repaint the patches"   $train ssl.py pretrain --task m --epochs $m "${common[@]}"
stage "linear probe of Model M's encoder"              python ssl.py probe --checkpoint "$out/m.pt" "${common[@]}"
stage "Model M continued from the InfoNCE encoder"     $train ssl.py pretrain --task m --init "$out/infonce.pt" --name m_infonce --epochs $more "${common[@]}"
stage "its linear probe"                               python ssl.py probe --checkpoint "$out/m_infonce.pt" "${common[@]}"
stage "Model M continued with InfoNCE beside it"       $train ssl.py pretrain --task m --init "$out/infonce.pt" --contrast 1 --name m_joint --epochs $joint --keep-epochs "${common[@]}"
stage "its linear probe"                               python ssl.py probe --checkpoint "$out/m_joint.pt" "${common[@]}"
stage "fine-tuning on labels"                          $train ssl.py finetune --checkpoint "$out/m_joint.pt" --epochs $tune --cutmix $cutmix --keep-epochs "${common[@]}"
if [ "$profile" != laptop ]; then  # costs as much again
stage "control: the same training from scratch"        $train ssl.py finetune --epochs $tune --cutmix $cutmix "${common[@]}"
fi

# ---------------------------------------------------------------- stage 2: pseudo-videos
video=(--checkpoint "$out/m_joint.pt" --epochs $film "${common[@]}")
# the report says: one clip a step, no loss but the clip's; the rest (learning rate, augmentation, smoothing) it leaves
# open, and here the start is our better Model M
report=(--frame-loss 0 --no-repeats --no-balanced)
as_the_report() {
stage "the report's training: one clip a step"         python video.py "${video[@]}" "${report[@]}" --clips 1 --lr 1e-4 --blocks 1 --name video_report_1
stage "its image encoder, probed"                      python ssl.py probe --checkpoint "$out/video_report_1.pt" "${common[@]}"
stage "the report's training, two blocks"              python video.py "${video[@]}" "${report[@]}" --clips 1 --lr 1e-4 --blocks 2 --name video_report_2
}
stage "factorised encoder, one temporal block"         $clips video.py "${video[@]}" --model encoder --blocks 1 --cutmix $cutmix
stage "its image encoder, probed"                      python ssl.py probe --checkpoint "$out/video_encoder_1.pt" "${common[@]}"
stage "factorised encoder, two temporal blocks"        $clips video.py "${video[@]}" --model encoder --blocks 2 --cutmix $cutmix
if [ "$profile" != laptop ]; then  # in full: hours, without a GPU
stage "factorised self-attention, one block"           $clips video.py "${video[@]}" --model divided --blocks 1 --cutmix $cutmix
stage "factorised self-attention, two blocks"          $clips video.py "${video[@]}" --model divided --blocks 2 --cutmix $cutmix
stage "control: without temporal positions"            $clips video.py "${video[@]}" --no-positions --name video_unordered --cutmix $cutmix
as_the_report
fi

# ---------------------------------------------------------------- stage 3: language
printf '\n== captions by the real BLIP, or by a small one of our own?\n'
if [ -e "$out/captions_blip.jsonl" ]; then captioner=blip  # begun here, or brought from another machine
else captioner=$(python multimodal.py captioner "${common[@]}"); fi  # blip or tiny; the reason goes to the terminal
captions=$out/captions_$captioner.jsonl
if [ "$captioner" = tiny ]; then
stage "a small BLIP for each fold, a small CLIP"       $train multimodal.py tiny --checkpoint "$out/m_joint.pt" --epochs $talk "${common[@]}"
fi
stage "a caption for every image"                      python multimodal.py caption --captioner "$captioner" "${common[@]}"
stage "CLIP embeddings of the captions"                python multimodal.py embed --captions "$captions" "${common[@]}"
fuse=($train multimodal.py fuse --epochs $join --cutmix $cutmix "${common[@]}" --captions)
stage "fusion: the image asks, the caption answers"    "${fuse[@]}" "$captions"
stage "control: image only"                            "${fuse[@]}" "$captions" --control image_only
stage "control: text only"                             "${fuse[@]}" "$captions" --control text_only
stage "fusion with attention over words"               "${fuse[@]}" "$captions" --text tokens
if [ "$profile" != laptop ]; then
stage "control: every caption from another image"      "${fuse[@]}" "$captions" --control shuffled
stage "fusion on the video model of one block"         "${fuse[@]}" "$captions" --blocks 1
if [ "$captioner" = tiny ]; then  # what happens when a captioner describes images whose labels it has seen
stage "captions by models that saw the labels"         python multimodal.py caption --captioner tiny --seen "${common[@]}"
stage "their embeddings"                               python multimodal.py embed --captions "$out/captions_tiny_seen.jsonl" "${common[@]}"
stage "control: fusion trained on them"                "${fuse[@]}" "$out/captions_tiny_seen.jsonl"
fi
fi

# ---------------------------------------------------------------- the questions that the report left open
if [ -n "$questions" ]; then
probe=(python ssl.py probe "${common[@]}" --checkpoint)
learn=($train ssl.py finetune --cutmix 0 "${common[@]}")
# does pre-training pay, and with how many labels? (fewer labels get more epochs, but fewer steps)
stage "probe of an untrained ViT, 1 % of the labels"   "${probe[@]}" untrained --labels 0.01 --name untrained_probe_1
stage "and with 10 %"                                  "${probe[@]}" untrained --labels 0.1 --name untrained_probe_10
stage "from scratch, 1 % of the labels"                "${learn[@]}" --labels 0.01 --epochs 50 --batch 32 --name finetune_scratch_1
stage "and with 10 %"                                  "${learn[@]}" --labels 0.1 --epochs 20 --name finetune_scratch_10
stage "and with all"                                   "${learn[@]}" --epochs 8
stage "all labels, fine-tuning Model M"                "${learn[@]}" --checkpoint "$out/m.pt" --epochs 8 --name finetune_m
stage "all labels, fine-tuning InfoNCE"                "${learn[@]}" --checkpoint "$out/infonce.pt" --epochs 8 --name finetune_infonce
for start in m infonce m_joint; do
stage "probe of $start, 1 % of the labels"             "${probe[@]}" "$out/$start.pt" --labels 0.01 --name ${start}_probe_1
stage "and with 10 %"                                  "${probe[@]}" "$out/$start.pt" --labels 0.1 --name ${start}_probe_10
stage "fine-tuning $start, 1 % of the labels"          "${learn[@]}" --checkpoint "$out/$start.pt" --labels 0.01 --epochs 50 --batch 32 --name finetune_${start}_1
stage "and with 10 %"                                  "${learn[@]}" --checkpoint "$out/$start.pt" --labels 0.1 --epochs 20 --name finetune_${start}_10
done

# what does each half of Model M's task bring, and does its border betray a turned patch?
for task in "masking 0" "rotation 0" "rotation 1" "both 1" "image-rotation 0" "image-rotation 1"; do
pretext=${task% *} gap=${task#* }
stage "Model M, task: $pretext, a gap of $gap"         $train ssl.py pretrain --task m --pretext $pretext --gap $gap --epochs $m --name m_${pretext}_$gap "${common[@]}"
stage "its linear probe"                               "${probe[@]}" "$out/m_${pretext}_$gap.pt"
done

# is the 8x8 patch the limit?
stage "from scratch, a convolution inside each patch"  "${learn[@]}" --epochs 8 --stem --name scratch_stem
stage "from scratch, width 192 instead of 128"         "${learn[@]}" --epochs 8 --dim 192 --name scratch_dim192
stage "from scratch, 64 patches of 4x4"                "${learn[@]}" --epochs 8 --patch 4 --name scratch_patch4

# one temporal block or two, on the report's clips; and from there to our training (video_encoder_1), step by step
as_the_report
stage "ten clips a step"                               $clips video.py "${video[@]}" "${report[@]}" --name video_random
stage "with every class in each step"                  $clips video.py "${video[@]}" --frame-loss 0 --no-repeats --name video_balanced
stage "of 1 to 16 different images"                    $clips video.py "${video[@]}" --frame-loss 0 --name video_repeats
fi

# ---------------------------------------------------------------- what was learned
pair=(--before "$out/m_joint.pt" --after "$out/finetune.pt")
stage "CLS-patch similarity, before and after"         python analysis.py maps "${pair[@]}" "${common[@]}"
stage "CKA across attention, before and after"         python analysis.py cka "${pair[@]}" "${common[@]}"
stage "pictures"                                       python analysis.py figures "${common[@]}"
stage "a moving picture: learning, epoch by epoch"     python analysis.py movie "${common[@]}"
stage "results"                                        python analysis.py report ${from_nothing:+--seconds $SECONDS} "${common[@]}"
warn
