"""The Triton kernels and the plans of their launches; the only folder that imports triton, and imported only to launch"""
