"""`opdlm eval` and `opdlm bench`: accuracy, retention, likelihood, speed."""
