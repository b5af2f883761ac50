#!/bin/sh
# Install torch: the build for this machine's GPU, or the CPU build where there is none.
# BIN is the virtual environment's bin folder, TORCH is gpu or cpu.
set -eu
version=$(sed -n 's/^torch==//p' constraints.txt)
pip="$BIN/python -m pip install --quiet --disable-pip-version-check"
if [ "$TORCH" = gpu ]; then
    $pip "torch==$version"
    exit 0
fi
# The CPU build carries the local version +cpu. An index that offers it is asked first; then the
# CPU index of PyTorch; and last whatever the configured index has under the plain version.
$pip "torch==$version+cpu" 2>/dev/null \
    || $pip --retries 1 --timeout 15 --index-url https://download.pytorch.org/whl/cpu "torch==$version" 2>/dev/null \
    || $pip "torch==$version"
