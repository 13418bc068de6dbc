"""Training with MindSpore: on Ascend NPUs, and on CPUs to try and to debug. The only folder that knows it."""
