"""hf_mimic: score, reweight, record and filter training samples by a reference model from the Hub."""
