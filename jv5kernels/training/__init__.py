"""The paper's training regimen in small: `jv5kernels train CORPUS OUT` trains and writes a checkpoint.

Stage 1 distils a teacher's embeddings into a small Qwen3 backbone; stage 2 trains one LoRA adapter a task on the
frozen backbone (arXiv 2602.15547). Needs the extra ``train``.
"""
