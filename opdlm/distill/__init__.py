"""`opdlm convert`: conversion of an autoregressive checkpoint by on-policy distillation."""
