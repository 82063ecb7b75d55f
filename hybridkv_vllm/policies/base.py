"""The interface of policies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar

from hybridkv_kernels.recall.layout import LandmarkKind

from hybridkv_vllm.policies.classify import classify
from hybridkv_vllm.policies.data import PolicyOptions, PromptScores, Recall, Selection, Verdict


class Policy(ABC):
    """A method that chooses what stays of a prompt's KV cache.

    A policy runs on the device, in stream order: `classify` layer by layer while the prefill's last chunk is
    computed, `select` once at its end. It must never wait for the device, so no shape and no Python branch
    may depend on a tensor's values.

    Attributes:
        name: what users call it.
        recalls: whether its dynamic heads recall chunks, where these found room in a tier.
        classifier: the classifier that the method defines; None where the server's option decides.
        landmark: the landmark kind that the method defines; None where the server's option decides.
    """

    name: ClassVar[str]
    recalls: ClassVar[bool] = False
    classifier: ClassVar[str | None] = None
    landmark: ClassVar[LandmarkKind | None] = None

    def budget_share(self, requested: float) -> float:
        """Share of the prompt's pages to reserve where the user asked for `requested`."""
        return requested

    def may_recall(self, has_visual: bool, options: PolicyOptions) -> bool:
        """Whether any head of a prompt can be found dynamic and recall, as far as known before it is scored.

        Args:
            has_visual: whether the prompt has visual tokens.
        """
        del has_visual, options
        return self.recalls

    def classify(self, scores: PromptScores, options: PolicyOptions) -> Verdict:
        """Judges the KV heads of any number of layers; a layer's verdict does not depend on the others.

        Raises:
            ValueError: unknown classifier; the message lists the known ones.
        """
        return classify(scores, replace(options, classifier=self.classifier or options.classifier))

    @abstractmethod
    def select(
        self,
        scores: PromptScores,
        verdict: Verdict,
        pages: int,
        options: PolicyOptions,
        recall: Recall | None = None,
    ) -> Selection:
        """Chooses the tokens that every KV head keeps.

        Args:
            scores: of all layers; see `PromptScores`. All tensors on one device.
            verdict: what `classify` said of these scores.
            pages: pages of this rank's arena, A * L * H. The heads never need more.
            options: see `PolicyOptions`.
            recall: None where no head recalls. A policy that does not recall ignores it. Where `pages` hold
                everything, everything is kept and nothing recalled.

        Raises:
            ValueError: a policy that cannot work with `pages`, or `pages` that do not hold the landmarks of
                `recall` and a chunk for as many heads as may recall.
        """
