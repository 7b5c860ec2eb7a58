"""Metal kernels, and how they are launched (launch.py). The .metal files serve PyTorch and MLX alike."""
