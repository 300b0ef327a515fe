"""Jobs around Diff2Flow models: encoding, sampling, depth, evaluation, serving and publishing."""
