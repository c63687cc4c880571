"""The equivalence certificate: a configuration on a grid of processes against the plain model on one rank."""
