"""fastdiff's parts inside other people's loops"""
