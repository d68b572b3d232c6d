"""What the config key `fp8` needs. Torch-free."""

PACKAGE = "torchao"
WAY_OUT = "install it with pip install 'landiff-pretrain[fp8]', or set fp8 = false"
MULTIPLE = 16
"""Of the rows and columns of matrices that float8 units multiply."""
