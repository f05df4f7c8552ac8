"""The Triton kernels and the plans of their launches: the one folder that imports triton, loaded at the first launch"""
