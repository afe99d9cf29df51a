"""Merge the row maxima of split query tokens."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

THREADS = 64  # heads of a piece


class MergeMaxLogits:
    """One CTA takes 64 heads of a token: a thread a head."""

    @cute.jit
    def __call__(
        self,
        partial_max: cute.Tensor,  # [slots, 64] fp32; a unit (token, 64 heads) has `splits` consecutive slots
        max_logits: cute.Tensor,  # [tokens, h_q] fp32
        splits: Int32,
        stream,
    ):
        tokens, heads = max_logits.shape
        self.kernel(partial_max, max_logits, splits).launch(
            grid=((heads + THREADS - 1) // THREADS, tokens, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, partial_max: cute.Tensor, max_logits: cute.Tensor, splits: Int32):
        head_tile, token, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        head = head_tile * THREADS + thread
        # What is launched behind this kernel starts early, too, but waits for its end, and so for the pieces.
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        if head < max_logits.shape[1]:
            first = (token * cute.arch.grid_dim()[0] + head_tile) * splits
            top = -Float32.inf
            for i in cutlass.range(splits, unroll=8):
                top = cute.arch.fmax(top, partial_max[first + i, thread])
            max_logits[token, head] = top
