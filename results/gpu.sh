#!/usr/bin/env bash
# What to run in the hour in which a GPU can be had, in pieces of at most ten minutes each, without
# a network, what fails first first:
#
#     bash results/gpu.sh 1              # does everything run? do GPU and CPU compute the same?
#     bash results/gpu.sh 2              # how fast is it, and how busy is the GPU?
#     bash results/gpu.sh 3              # 100 epochs of ResNet-18; again until it is finished
#     bash results/gpu.sh 4              # rows, a study, kill and resume
#     ACC=cpu bash results/gpu.sh N      # tiny, on the CPU: is there a typing error?
#
# DATA is a folder of CIFAR-10 images (digits without one), OUT where runs are kept, PYTHON which
# Python to take: other versions than requirements.txt's do, and are printed.
set -euo pipefail
cd "$(dirname "$0")/.."
ACC=${ACC:-cuda} PYTHON=${PYTHON:-python3} OUT=${OUT:-runs/gpu}
DATA=${DATA:-data/cifar10-jpeg}
[ -d "$DATA" ] || { echo "no folder $DATA: taking digits" >&2; DATA=digits; }
export TEST_DEVICE=$ACC PYTHONUNBUFFERED=1
mkdir -p "$OUT"

run() { echo "+ $*"; "$PYTHON" "$@"; }

# Small sizes for smoke runs and, on a CPU, for everything.
tiny="--dataset digits --accelerator $ACC --epochs 2 --stem imagenet --batch_size 64 --no-baselines --knn_k 5 --probe_epochs 2"
tiny="$tiny --hidden_dim 64"
[ "$ACC" = cuda ] || tiny="$tiny --width 0.25"  # narrower still on a CPU
fresh() { rm -rf "${OUT:?}/$1"; echo "$OUT/$1"; }

versions() {
    run - <<'END'
import sys, torch, torchvision, lightning, optuna
print(sys.version.split()[0], "torch", torch.__version__, "torchvision", torchvision.__version__,
      "lightning", lightning.__version__, "optuna", optuna.__version__)
from machinery.devices import cuda_problem, gpu_record
print(gpu_record(), cuda_problem() or "")
END
}

case "${1:?which piece: 1, 2, 3 or 4}" in
1)
    versions
    "$PYTHON" -c "import pytest, xdist" || { echo "pip install -r tests/requirements.txt first" >&2; exit 2; }
    run simCLR.py $tiny --output_dir "$(fresh plain)"
    run simCLR.py $tiny --stages pretrain --micro_batch_size 24 --output_dir "$(fresh micro)"
    run simCLR.py $tiny --stages pretrain --blur 0.5 --norm group --output_dir "$(fresh blur)"
    run simCLR.py $tiny --stages pretrain --precision fp32 --output_dir "$(fresh fp32)"
    run simCLR.py $tiny --encoder compact --stem cifar --output_dir "$(fresh compact)"
    run rnn.py --dataset digits --accelerator "$ACC" --cell all --epochs 2 --output_dir "$(fresh rows)"
    run rnn_hyperparameter_tune.py --dataset digits --accelerator "$ACC" --n_trials 4 --epochs 1 \
        --workers 2 --output_dir "$(fresh study)"
    run -m pytest -q -n 0 -p no:cacheprovider -m gpu tests/test_gpu.py
    if [ "$ACC" = cuda ]; then
        run simCLR.py $tiny --stages pretrain --precision fp16 --output_dir "$(fresh fp16)"
        run simCLR.py $tiny --stages pretrain --precision fp16 --optimizer muon --learning_rate 0.03 \
            --output_dir "$(fresh muon)"
        run simCLR.py $tiny --stages pretrain --compile --output_dir "$(fresh compile)"
        run rnn.py --dataset digits --cell all --epochs 2 --precision fp16 --gradient_clip 1 \
            --output_dir "$(fresh rows-fp16)"
        # A GPU of 8 GiB: does the advice come, and does what it says help?
        cap="import torch, runpy, sys; total = torch.cuda.get_device_properties(0).total_memory"
        cap="$cap; torch.cuda.set_per_process_memory_fraction(8 * 2**30 / total)"
        cap="$cap; sys.argv[0] = 'simCLR.py'; runpy.run_path('simCLR.py', run_name='__main__')"
        large="--dataset $DATA --encoder resnet50 --batch_size 1024 --epochs 1 --stages pretrain"
        run -c "$cap" $large --output_dir "$(fresh eight)" && exit 1
        run -c "$cap" $large --micro_batch_size 64 --max_time 00:00:01:00 --output_dir "$(fresh eight-micro)"
    fi
    ;;
2)
    versions
    if [ "$ACC" = cuda ]; then run -m benchmarks.on_gpu
    else run -m benchmarks.on_gpu --accelerator cpu --batch_size 8 --steps 2 --rounds 1; fi
    ;;
3)
    versions
    folder="$OUT/simclr-100"
    if [ -f "$folder/config.yaml" ]; then run simCLR.py --resume "$folder" --max_time 00:00:08:00
    elif [ "$ACC" = cuda ]; then
        run simCLR.py --config configs/gpu_100_epochs.yaml --dataset "$DATA" \
            --max_time 00:00:08:00 --output_dir "$folder"
    else
        run simCLR.py --config configs/gpu_100_epochs.yaml $tiny --max_time 00:00:00:01 --output_dir "$folder"
        run simCLR.py --resume "$folder"
    fi
    ;;
4)
    versions
    epochs=30 trials=20 share=0.9
    [ "$ACC" = cuda ] || { DATA=digits; epochs=2; trials=2; share=0.2; }
    run rnn.py --dataset "$DATA" --accelerator "$ACC" --cell all --epochs $epochs --output_dir "$(fresh rows)"
    run rnn_hyperparameter_tune.py --dataset "$DATA" --accelerator "$ACC" --space extended \
        --n_trials $trials --epochs 3 --train_fraction $share --workers 2 --output_dir "$(fresh study)"
    # Killed once its first checkpoint is there, and resumed.
    folder=$(fresh killed)
    "$PYTHON" simCLR.py $tiny --epochs 6 --stages pretrain,knn --checkpoint_every 0 --output_dir "$folder" &
    while kill -0 $! 2>/dev/null && [ ! -f "$folder/checkpoints/last.ckpt" ]; do sleep 0.2; done
    kill -9 $! 2>/dev/null || true
    wait $! || true
    run simCLR.py --resume "$folder"
    ;;
*) echo "which piece: 1, 2, 3 or 4" >&2; exit 2 ;;
esac
