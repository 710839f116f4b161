"""The study of 25 Gaussians (arXiv:1606.00704, section 4.6): ALI against four other ways to learn inference."""
