"""What runs on the device, in Triton's language: Python in form only. Importing a module here imports Triton.

The host's side is in `endor.kernels.triton_launch` and `endor.kernels.triton_matmul`.
"""
