"""`opdlm eval` and `opdlm bench`: scores, retention, likelihoods, speed."""
