"""A CLIP that returns every token, of pictures and of captions, and not only one embedding."""

import torch
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

from fmfa.errors import ConfigError
from fmfa.models.interfaces import Encoded


class TokenEncoder(nn.Module):
    """The encoding half of `fmfa.models.clip.ClipRetriever`, which builds its towers.

    Attributes:
        clip: open_clip's model.
    """

    clip: nn.Module

    def encode_image(self, images: Tensor) -> Encoded:
        """Encode images, float [B, 3, H, W] normalised.

        Returns:
            tokens [B, 1+N, D] (final LayerNorm and projection at every position), embedding [B, D].

        Raises:
            ConfigError: images of another size than the model's.
        """
        visual = self.clip.visual
        if tuple(images.shape[-2:]) != tuple(visual.image_size):
            raise ConfigError(
                f"images of {tuple(images.shape[-2:])} pixels (height, width); the model was built for "
                f"{tuple(visual.image_size)}: resize the images or build the model for their size"
            )
        output = visual.forward_intermediates(
            images.to(visual.conv1.weight.dtype),
            indices=1,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        hidden = torch.cat([output["image_intermediates_prefix"][0], output["image_intermediates"][0]], dim=1)
        tokens = visual.ln_post(hidden) @ visual.proj.to(hidden.dtype)  # [B, 1+N, width] -> [B, 1+N, D]
        if visual.pool_type != "avg":
            return Encoded(tokens, tokens[:, 0])
        if visual.final_ln_after_pool:
            pooled = visual.ln_post(hidden[:, 1:].mean(dim=1))
            return Encoded(tokens, pooled @ visual.proj.to(pooled.dtype))
        return Encoded(tokens, tokens[:, 1:].mean(dim=1))

    def encode_text(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, positions: int | None = None
    ) -> Encoded:
        """Encode captions, int64 [B, context length].

        By default a causal tower runs on the longest caption of the batch: what follows the end token
        cannot change what stands before it.

        Args:
            ids: token ids.
            attention_mask: not used: a CLIP text tower finds the end token itself.
            positions: how many context positions to run and return; None takes `longest_caption`.

        Returns:
            tokens [B, L, D] (final LayerNorm and projection at every position), embedding [B, D] at the
            end token.
        """
        tower = getattr(self.clip, "text", self.clip)
        length = int(self.longest_caption(ids)) if positions is None else positions
        ids = ids[:, :length]
        dtype = tower.transformer.get_cast_dtype()
        x = tower.token_embedding(ids).to(dtype) + tower.positional_embedding[:length].to(dtype)
        mask = None if tower.attn_mask is None else tower.attn_mask[:length, :length]
        x = tower.ln_final(tower.transformer(x, attn_mask=mask))  # [B, L, width]
        projection = tower.text_projection
        if isinstance(projection, nn.Linear):
            x = projection(x)
        elif projection is not None:
            x = x @ projection.to(x.dtype)  # [B, L, D]
        return Encoded(x, text_global_pool(x, ids, self._pool_type, self._end_id))

    def longest_caption(self, ids: Tensor) -> Tensor:
        """Positions that the text tower needs for the embeddings of `ids` [B, L], an int64 scalar.

        Up to the last end token; all L where the tower is not causal or pools another position.
        """
        tower = getattr(self.clip, "text", self.clip)
        if tower.attn_mask is None or self._pool_type not in ("argmax", "eos"):
            return torch.tensor(ids.shape[1], device=ids.device)
        return self.end_positions(ids).max() + 1

    def end_positions(self, ids: Tensor) -> Tensor:
        """Position of each caption's end token, int64 [B]: the largest id, or the tower's own end id.

        A tower that pools the last position has no end token; there it is the last non-zero id.
        """
        if self._pool_type == "argmax":
            return ids.argmax(dim=1)
        if self._pool_type == "eos":
            return (ids == self._end_id).int().argmax(dim=1)
        return ids.shape[1] - 1 - ids.ne(0).flip(1).int().argmax(dim=1)

    def caption_positions(self, ids: Tensor) -> Tensor:
        """Bool [B, L]: start token to end token."""
        return torch.arange(ids.shape[1], device=ids.device) <= self.end_positions(ids)[:, None]

    @property
    def _pool_type(self) -> str:
        return self.clip.text_pool_type if hasattr(self.clip, "text_pool_type") else self.clip.text.pool_type

    @property
    def _end_id(self) -> int:
        return self.clip.text_eos_id if hasattr(self.clip, "text_eos_id") else self.clip.text.eos_id
