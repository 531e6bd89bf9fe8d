"""The training loop, devices and checkpoints that `opdlm convert` and `opdlm train` share."""
