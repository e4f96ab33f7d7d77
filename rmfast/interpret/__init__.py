"""Where a reward arises: the lens, attribution, features of sparse autoencoders, and their comparison with patching."""
