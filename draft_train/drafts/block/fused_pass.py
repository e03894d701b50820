"""Hand-written forward and backward pass over blocks, for GPUs: the loss and gradients of `forward` with autograd.

Keys and values of the context are computed once per layer and row, not once per block. Blocks then go through in
slices, forward and backward at once, so that activations are those of one slice, however many anchors a batch has. The
gradients of the context's keys and values add up in float32 over the slices, and go back through the projections and
`fc` at the end. Head and loss run in slices of rows, and compute the gradient at once, so that no logits are kept; the
Markov head's product is part of the head's: `[norm(h), W1[x]] [lm_head, W2]^T`.

Needed operations, by counting: per slot row and layer `2 H (2 N D + 2 G D + 3 I)` for the products and `4 N D` times
the keys that it sees, per row with loss `2 V (H + M)` for the head, per context row `2 H (taps H + 2 L G D)`; a
backward pass takes twice that, without the gradient of a frozen head's weights and of the taps. For H 2688, 32/2 heads
of 128, I 6144, V 32,000, 6 layers, 8 slots, a rank of 256 and a window of 1,024 these are 27 GFLOP per anchor.

Shape suffixes are those of `fused_forward`, with M the Markov rank.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from draftcache.draft_train.data.batches import Batch
from draftcache.draft_train.drafts.block.fused_forward import (
    BlockForward,
    BlockSettings,
    BlockSlice,
    Context,
    LayerState,
)
from draftcache.draft_train.drafts.block.fused_head import BlockHead, batch_weights
from draftcache.draft_train.drafts.block.fused_weights import LayerWeights
from draftcache.draft_train.drafts.block.kernels.attention import attend_blocks_backward
from draftcache.draft_train.drafts.block.model import BlockModel
from draftcache.draft_train.drafts.gradient_pass import GradientHook
from draftcache.draft_train.kernels.normed_heads import normed_heads_backward
from draftcache.draft_train.kernels.norms import rms_norm, rms_norm_backward
from draftcache.draft_train.kernels.swiglu import swiglu_backward_
from draftcache.draft_train.loss.objective import Objective, ObjectiveResult, tail_sums
from draftcache.store.common.products import add_product


class BlockPass(BlockForward):
    """The gradient pass on one GPU. Implements `GradientPass`. On the CPU the kernels' plain twins run, for tests."""

    def __init__(
        self,
        model: BlockModel,
        objective: Objective,
        embeddings: Tensor,
        settings: BlockSettings | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """The arguments are those of `BlockForward`."""
        super().__init__(model, embeddings, settings, dtype)
        self.head = BlockHead(self.weights, objective, self.settings.rows)

    @torch.no_grad()
    def __call__(self, batch: Batch, ready: GradientHook | None = None) -> ObjectiveResult:
        """Gradients are complete, and `ready` is called, in this order: heads and norm, the layers from the last one
        to the first without what the context reads, and all the rest.
        """
        say = ready or (lambda _: None)
        self.weights.refresh()
        self.weights.groups.attach()
        layers, masks = self.weights.layers(gradients=True), self._masks(batch)
        context = self._context(batch, layers)
        steps = batch.step_tokens.shape[1]
        result = ObjectiveResult.zeros(steps, batch.taps.device)
        wide = self.weights.groups.gradients["fc"].dtype
        context_gradients = [torch.zeros_like(kv, dtype=wide) for kv in context.kv]
        row_weights = batch_weights(batch, self.head.objective)
        last = batch.start_index.shape[0]
        for part in self._slices(batch, self.shape.slots(steps)):
            ends = part.blocks.stop == last
            hidden, states = self._embedded(part), []
            for number, layer in enumerate(layers):
                hidden, state = self._forward_layer(layer, context.kv[number], masks[number], part, hidden)
                states.append(state)
            upstream = self.head.backward(batch, part, hidden, row_weights, result)
            del hidden
            if ends:
                say(self.head.parameters)
            for number in reversed(range(len(layers))):
                gradient = context_gradients[number][part.rows]
                upstream = self._layer_backward(layers[number], part, states.pop(), upstream, gradient)
                if ends:
                    say(_own_parameters(layers[number]))
            self._embeddings_backward(part, upstream)
            del upstream
        if not last:
            for given in (self.head.parameters, *map(_own_parameters, layers)):
                say(given)
        self._context_backward(batch, context, layers, context_gradients)
        said = {id(value) for given in (self.head.parameters, *map(_own_parameters, layers)) for value in given}
        say([value for value in self.model.parameters() if id(value) not in said])
        for total, added in zip((result.tail_mass, result.tail_positions), tail_sums(batch), strict=True):
            total.copy_(added)
        for number in range(steps):
            result.rows[number].fill_(int((batch.host.steps > number).sum()))
        return result

    def _layer_backward(
        self, layer: LayerWeights, part: BlockSlice, state: LayerState, upstream: Tensor, context_gradient: Tensor
    ) -> Tensor:
        """Return the gradient [T, H] of a layer's input for `upstream` [T, H], the gradient of its output.

        The gradient of the context's keys and values is added to `context_gradient`, that of the slice's rows.
        """
        module, attention, gradients = layer.layer, state.attention, layer.gradients
        after = self._mlp_backward(layer, state, upstream)
        given = (after @ layer.output).view_as(attention.out)
        add_product(gradients["output"], after, attention.out.view(len(after), -1))
        q_gradient, kv_gradient, sink_gradient = attend_blocks_backward(given, attention, context_gradient)
        del given
        if sink_gradient is not None:
            sinks = module.self_attn.attention_sink_bias
            assert sinks is not None
            self.weights.gradient(sinks).add_(sink_gradient)
        projected = normed_heads_backward(
            q_gradient.flatten(0, 1),
            kv_gradient.flatten(0, 1),
            state.projected,
            layer.norms,
            part.table,
            part.every,
            self.weights.gradient(module.self_attn.q_norm.weight),
            self.weights.gradient(module.self_attn.k_norm.weight),
        )
        weight = module.input_layernorm.weight
        add_product(gradients["qkv"], projected, rms_norm(state.hidden, weight, self.eps))
        return rms_norm_backward(
            projected @ layer.qkv, state.hidden, weight, self.eps, self.weights.gradient(weight), after
        )

    def _mlp_backward(self, layer: LayerWeights, state: LayerState, upstream: Tensor) -> Tensor:
        """Return the gradient [T, H] of the MLP's input for `upstream` [T, H], the gradient of its output."""
        weight, gradients = layer.layer.post_attention_layernorm.weight, layer.gradients
        normed = self._mlp_input(layer, state.after)
        gate_up = normed @ layer.gate_up.t() if state.gate_up is None else state.gate_up
        state.gate_up = None
        activation = swiglu_backward_(upstream @ layer.down, gate_up)
        add_product(gradients["down"], upstream, activation)
        del activation
        add_product(gradients["gate_up"], gate_up, normed)
        given = gate_up @ layer.gate_up
        return rms_norm_backward(given, state.after, weight, self.eps, self.weights.gradient(weight), upstream)

    def _embeddings_backward(self, part: BlockSlice, upstream: Tensor) -> None:
        """Add the gradient [T, H] of the slots' inputs to that of trained embeddings."""
        if self.model.embed_tokens is None:
            return
        gradient = self.weights.embedding(self.model.embed_tokens)
        by_slot = upstream.view(*part.tokens.shape, -1).to(gradient.dtype)
        # Accumulating with `index_put_` sorts, so that equal batches give equal bits. Mask tokens are summed first.
        gradient.index_put_((part.tokens[:, 0],), by_slot[:, 0], accumulate=True)
        gradient[self.shape.mask_token_id] += by_slot[:, 1:].sum((0, 1))

    def _context_backward(
        self, batch: Batch, context: Context, layers: list[LayerWeights], kv_gradients: list[Tensor]
    ) -> None:
        """Add the gradients of what makes the context's keys and values, for theirs of all slices."""
        every = torch.arange(context.base.shape[0], device=context.base.device)
        given = torch.zeros_like(context.base)
        none = torch.zeros_like(layers[0].norms.query)  # ranks may be adding up the gradient of q_norm by now
        for layer, projected, kv_gradient in zip(layers, context.projected, kv_gradients, strict=True):
            attention = layer.layer.self_attn
            gradient = normed_heads_backward(
                kv_gradient.new_empty(kv_gradient.shape[0], 0, self.shape.head_dim),
                kv_gradient,
                projected,
                replace(layer.norms, queries=0),
                context.table,
                every,
                none,
                self.weights.gradient(attention.k_norm.weight),
            )
            add_product(layer.gradients["qkv"][layer.queries :], gradient, context.states)
            given.addmm_(gradient, layer.qkv[layer.queries :])
        weight = self.model.hidden_norm.weight
        base = rms_norm_backward(given, context.base, weight, self.eps, self.weights.gradient(weight))
        add_product(self.weights.groups.gradients["fc"], base, batch.taps.to(base.dtype))


def _own_parameters(layer: LayerWeights) -> list[torch.nn.Parameter]:
    """Return the parameters of a layer whose gradients do not wait for the context's."""
    attention = layer.layer.self_attn
    late = {
        id(value) for module in (attention.k_proj, attention.v_proj, attention.k_norm) for value in module.parameters()
    }
    return [value for value in layer.layer.parameters() if id(value) not in late]
