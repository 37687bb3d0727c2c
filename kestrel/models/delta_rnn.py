"""Keyword spotter of delta LSTM or GRU layers with a class layer at every frame (DeltaRNN, EdgeDRNN, Spartus)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kestrel.errors import UsageError
from kestrel.models.network import Network, Phase, WeightGroup
from kestrel.nn.cbtd import Balance, Pruner
from kestrel.nn.delta import DeltaGRU, DeltaLSTM
from kestrel.nn.delta_fixed import Fixed, Numerics, Rounding, apply

_ROUNDING: dict[int, Rounding | None] = {0: None, 1: "round", 2: "floor"}
_EPOCH = 100  # updates of an epoch where the training loop does not say


def _format(name: str, mode: int, qi: int, qf: int) -> Fixed | None:
    if mode not in _ROUNDING:
        raise UsageError(f"model.{name}: {mode}; choose 0 (floating point), 1 (round) or 2 (floor)")
    rounding = _ROUNDING[mode]
    return None if rounding is None else Fixed(qi, qf, rounding)


class DeltaNetwork(Network):
    """Delta layers -> optionally Linear, ReLU, dropout (fc_extra) -> class layer (cl) at every frame -> one decision.

    Args (the original's names where it has them):
        input_size, classes: features of a frame; number of classes.
        rnn_type, rnn_layers, rnn_size, rnn_dropout: the delta layers; dropout is between layers.
        fc_extra_size, fc_dropout: the extra layer; size 0 = none.
        use_hardsigmoid, use_hardtanh: clip(0.25 x + 0.5, 0, 1) and clip(x, -1, 1).
        qa, qw, qc, qcw: 0 floating point, 1 round, 2 floor, of activations and non-linearities, weights, logits and class
            weights, in the formats Q(aqi.aqf), Q(nqi.nqf), Q(wqi.wqf), Q(cqi.cqf), Q(cwqi.cwqf). They act in training
            and evaluation alike.
        thx, thh: thresholds of inputs and hidden states, one or one per layer. delta_from: the stage from which they act.
        beta: strength of the penalty on the mean |dh|.
        cbtd_from: the stage from which weights are pruned. gamma_rnn, gamma_fc: pruned share of the delta layers and of
            fc_extra. num_array_pe, cbtd_group: see `kestrel.nn.cbtd.Balance`. alpha_anneal_epoch: epochs of stage
            pretrain after which pruning is complete; alpha_anneal_retrain: the same of stage retrain where pruning begins
            there, 0 = at once. cbtd_interval: updates between prunings; None = an epoch.
        loss: `utterance`, cross-entropy of the logits averaged over time; `frame`, the mean of each frame's
            cross-entropy, where the first label_head and last label_tail frames are silence, as in the original.
        decision: `mean_logits`, or `last_speech`: the logits of the last frame that is not silence, else of the last.
        silence_class: index of silence; negative counts from the end; None = no such class.

    Raises UsageError for settings that do not fit together.
    """

    trained: Tensor
    logit_peak: Tensor
    class_updates: Tensor

    def __init__(
        self,
        *,
        input_size: int,
        classes: int,
        rnn_type: Literal["LSTM", "GRU"] = "GRU",
        rnn_layers: int = 1,
        rnn_size: int = 64,
        rnn_dropout: float = 0.0,
        fc_extra_size: int = 0,
        fc_dropout: float = 0.0,
        use_hardsigmoid: bool = False,
        use_hardtanh: bool = False,
        qa: int = 0,
        qw: int = 0,
        qc: int = 0,
        qcw: int = 0,
        aqi: int = 3,
        aqf: int = 5,
        wqi: int = 1,
        wqf: int = 7,
        nqi: int = 2,
        nqf: int = 6,
        cqi: int = 3,
        cqf: int = 5,
        cwqi: int = 1,
        cwqf: int = 7,
        thx: list[float] | float = 0.0,
        thh: list[float] | float = 0.0,
        delta_from: Literal["pretrain", "retrain"] = "retrain",
        beta: float = 0.0,
        cbtd_from: Literal["none", "pretrain", "retrain"] = "none",
        gamma_rnn: float = 0.7,
        gamma_fc: float = 0.75,
        num_array_pe: int = 16,
        cbtd_group: int = 1,
        alpha_anneal_epoch: int = 100,
        alpha_anneal_retrain: int = 0,
        cbtd_interval: int | None = None,
        loss: Literal["utterance", "frame"] = "utterance",
        decision: Literal["mean_logits", "last_speech"] = "mean_logits",
        silence_class: int | None = -1,
        label_head: int = 2,
        label_tail: int = 2,
    ) -> None:
        super().__init__()
        if silence_class is None:
            if decision == "last_speech":
                raise UsageError("model.decision: last_speech needs a class of silence: set model.silence_class")
            if loss == "frame" and (label_head or label_tail):
                raise UsageError("model.label_head, model.label_tail: set both to 0 where model.silence_class is null")
        elif not -classes <= silence_class < classes:
            raise UsageError(f"model.silence_class: {silence_class} is out of bounds ({-classes}..{classes - 1})")
        self.input_size, self.classes = input_size, classes
        self.activation = _format("qa", qa, aqi, aqf)
        self.weight_format = _format("qw", qw, wqi, wqf)
        self.logit_format = _format("qc", qc, cqi, cqf)
        self.class_format = _format("qcw", qcw, cwqi, cwqf)
        numerics = Numerics(
            self.activation, _format("qa", qa, nqi, nqf), self.weight_format, bool(use_hardsigmoid), bool(use_hardtanh)
        )
        cell = DeltaLSTM if rnn_type == "LSTM" else DeltaGRU
        self.rnn: DeltaLSTM | DeltaGRU = cell(input_size, rnn_size, rnn_layers, thx, thh, numerics, rnn_dropout)
        self.thx, self.thh, self.delta_from, self.beta = thx, thh, delta_from, float(beta)
        self.fc_extra = nn.Linear(rnn_size, fc_extra_size) if fc_extra_size else None
        self.fc_dropout = nn.Dropout(fc_dropout)
        self.cl = nn.Linear(fc_extra_size or rnn_size, classes)
        self.rnn.reset_for_keywords()
        for linear in (self.fc_extra, self.cl):
            if linear is not None:
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)
        self.loss, self.decision = loss, decision
        self.silence = None if silence_class is None else silence_class % classes
        self.head, self.tail = label_head, label_tail
        self.cbtd_from, self.interval = cbtd_from, cbtd_interval
        self.anneal = {"pretrain": alpha_anneal_epoch, "retrain": alpha_anneal_retrain}  # epochs
        self.pruner: Pruner | None = None
        self.pruner_pes = num_array_pe * cbtd_group  # PEs that get the same work in each column
        if cbtd_from != "none":
            balance = Balance(float(gamma_rnn), num_array_pe, cbtd_group)
            plan = {f"rnn.{name}": balance for name, _ in self.rnn.named_parameters() if name.startswith("weight")}
            if self.fc_extra is not None:
                plan["fc_extra.weight"] = Balance(float(gamma_fc), num_array_pe, cbtd_group)
            self.pruner = Pruner(self, plan)
        self.register_buffer("trained", torch.zeros((), dtype=torch.int64))  # the stage of the weights: 0, 1 = retrain
        if self.class_format is not None:
            self.register_buffer("logit_peak", torch.zeros(()))  # of this epoch
            self.register_buffer("class_updates", torch.zeros((), dtype=torch.int64))
        self._peak_before: Tensor | None = None
        self._terms: dict[str, Tensor] = {}
        self._thresholds_of_stage()

    # --------------------------------------------------------------------------------------------------------- stages

    def set_phase(self, phase: Phase) -> None:
        """Switch dropout; thresholds and pruning follow the stage that the weights were trained in."""
        super().set_phase(phase)
        self._terms = {}
        if phase != "eval":
            stage = int(phase == "retrain")
            if stage != int(self.trained):
                self.trained.fill_(stage)
                if self.pruner is not None:
                    self.pruner.restart()
            if stage and self.pruner is not None and (self.cbtd_from == "pretrain" or not self.anneal["retrain"]):
                self.pruner.hold(self._parameters_by_name())
        self._thresholds_of_stage()
        self.rnn.masks = {}
        if phase == "eval":
            cut = len("rnn.")
            self.rnn.masks = {name[cut:]: mask for name, mask in self.masks().items() if name.startswith("rnn.")}

    def _thresholds_of_stage(self) -> None:
        acting = self.delta_from == "pretrain" or bool(self.trained)
        self.rnn.set_thresholds(self.thx if acting else 0.0, self.thh if acting else 0.0)

    def set_thresholds(self, thx: list[float] | float, thh: list[float] | float) -> None:
        """Change the thresholds from here on (in stage pretrain they act where delta_from is pretrain)."""
        self.thx, self.thh = thx, thh
        self._thresholds_of_stage()

    @property
    def _prunes(self) -> bool:
        return self.pruner is not None and (self.cbtd_from == "pretrain" or bool(self.trained))

    def _parameters_by_name(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())

    def masks(self) -> dict[str, Tensor]:
        """Masks of fully pruned weights, 0 or 1 by parameter name; {} where the stage prunes nothing."""
        if self.pruner is None or not self._prunes:
            return {}
        weights = self._parameters_by_name()
        self.pruner.find(weights)
        return self.pruner.masks(weights)

    # -------------------------------------------------------------------------------------------------------- forward

    def frame_logits(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """[B, T, F] -> logits of every frame [B, T, C]. `lengths` [B]: valid frames of clips padded at their ends."""
        out = self.rnn(x, lengths=lengths)
        if self.training and self.beta > 0 and self.rnn.is_delta:
            self._terms["delta_h"] = self.beta * out.change
        h = apply(self.activation, out.h)  # dropout between layers may have left the format; else nothing changes
        if self.fc_extra is not None:
            weight, bias = self._linear("fc_extra", self.fc_extra, self.weight_format)
            h = self.fc_dropout(apply(self.activation, torch.relu(functional.linear(h, weight, bias))))
        logits = functional.linear(h, *self._linear("cl", self.cl, self.class_format))
        if self.training and self.class_format is not None:
            self._peak_before = self.logit_peak.clone()
            self.logit_peak.copy_(torch.maximum(self.logit_peak, logits.detach().abs().max()))
        return apply(self.logit_format, logits)

    def _linear(self, name: str, layer: nn.Linear, form: Fixed | None) -> tuple[Tensor, Tensor]:
        weight: Tensor = layer.weight
        if self.phase == "eval" and self.pruner is not None and self._prunes and f"{name}.weight" in self.pruner.plan:
            weight = weight * self.pruner.mask(f"{name}.weight", weight.shape)
        return apply(form, weight), apply(form, layer.bias)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """[B, T, F] -> [B, C].

        In evaluation, the logits of the decision. In training, what the loss is made of: the mean logits, or with
        `loss: frame` the mean log-probabilities, whose normalisation `penalty` gives back, so that the sum is the mean
        cross-entropy of the frames.
        """
        self._terms = {}
        z = self.frame_logits(x, lengths)  # [B, T, C]
        if self.training:
            return self._frame_loss(z, lengths) if self.loss == "frame" else _mean_over_time(z, lengths)
        return _mean_over_time(z, lengths) if self.decision == "mean_logits" else self._last_speech(z, lengths)

    def _frame_loss(self, z: Tensor, lengths: Tensor | None) -> Tensor:
        steps = z.shape[1]
        places = torch.arange(steps, device=z.device)
        ends = torch.full((z.shape[0], 1), steps, device=z.device) if lengths is None else lengths.to(z.device)[:, None]
        valid = places < ends  # [B, T]
        silent = valid & ((places < self.head) | (places >= ends - self.tail))
        share = valid / ends  # each clip counts once
        log_p = functional.log_softmax(z, dim=-1)
        summed = (log_p * (share * ~silent)[..., None]).sum(1)  # [B, C]
        rest = -summed.logsumexp(-1).mean()  # cross_entropy(summed) + rest = -summed[label]
        if self.silence is not None:
            rest = rest - (log_p[..., self.silence] * share * silent).sum(1).mean()
        self._terms["frames"] = rest
        return summed

    def _last_speech(self, z: Tensor, lengths: Tensor | None) -> Tensor:
        assert self.silence is not None
        steps = z.shape[1]
        places = torch.arange(steps, device=z.device)
        speech = z.argmax(-1) != self.silence  # [B, T]
        last = torch.full_like(speech[:, 0], steps - 1, dtype=torch.int64)
        if lengths is not None:
            last = lengths.to(z.device).long() - 1
            speech = speech & (places <= last[:, None])
        found = torch.where(speech, places, torch.full_like(places, -1)).amax(1)  # [B], -1 = all silent
        frame = torch.where(found < 0, last, found)
        chosen = z.gather(1, frame[:, None, None].expand(-1, 1, z.shape[2])).squeeze(1)
        return chosen + 0.0 * z[:, -1]  # what is not finite in the end must not hide behind an earlier frame

    def penalty(self) -> dict[str, Tensor]:
        """Of the last forward pass in training: `delta_h` = beta mean |dh| over frames, units and layers, where thresholds
        act; `frames`, what makes the loss that of the frames (see `forward`)."""
        zero = self.cl.weight.new_zeros(())
        names = []
        if self.training and self.beta > 0 and self.rnn.is_delta:
            names.append("delta_h")
        if self.training and self.loss == "frame":
            names.append("frames")
        return {name: self._terms.get(name, zero) for name in names}

    # --------------------------------------------------------------------------------------------------------- updates

    @torch.no_grad()
    def project(self) -> None:
        """Hold weights inside their formats, scale the class layer after an epoch, and prune where it is due."""
        epoch = self.updates_per_epoch or _EPOCH
        for name, parameter in self.named_parameters():
            form = self.class_format if name.startswith("cl.") else self.weight_format
            if form is not None:
                parameter.clamp_(-form.high, form.high)  # symmetric, as weights are stored
        if self.class_format is not None:
            self._scale_classes(epoch)
        if self.pruner is not None and self._prunes:
            interval, epochs = self.interval or epoch, self.anneal["retrain" if bool(self.trained) else "pretrain"]
            self.pruner.after_update(self._parameters_by_name(), interval, round(epochs * epoch / interval))

    def _scale_classes(self, epoch: int) -> None:
        """Once per epoch: bring the largest logit seen inside the format of the logits, by the class layer as a whole."""
        self.class_updates += 1
        if int(self.class_updates) % epoch:
            return
        # The peak before this batch: that one is the same in all processes of a parallel training.
        peak = float(self.logit_peak if self._peak_before is None else self._peak_before)
        limit = self.logit_format.high if self.logit_format is not None else None
        if limit is not None and peak > limit:
            for parameter in self.cl.parameters():
                parameter.mul_(limit / peak)
        self.logit_peak.zero_()

    # ---------------------------------------------------------------------------------------------------------- counts

    def layer_table(self, frames: int) -> list[dict[str, Any]]:
        """One row per layer; `macs_per_frame` is dense, without what deltas and pruning save."""
        rows = []
        for layer in range(self.rnn.num_layers):
            parts = [getattr(self.rnn, f"{part}_l{layer}") for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            rows.append(_row(f"rnn.l{layer}", sum(p.numel() for p in parts), sum(p.numel() for p in parts[:2]), frames))
        for name in ("fc_extra", "cl"):
            linear = getattr(self, name)
            if linear is not None:
                parameters = linear.weight.numel() + linear.bias.numel()
                rows.append(_row(name, parameters, linear.weight.numel(), frames))
        return rows

    @torch.no_grad()
    def weight_groups(self) -> list[WeightGroup]:
        """Weights and biases as they are stored: pruned, and in their formats."""
        masks, groups = self.masks(), []
        for name, parameter in self.named_parameters():
            value = parameter.detach() * masks[name] if name in masks else parameter.detach().clone()
            form = self.class_format if name.startswith("cl.") else self.weight_format
            if form is None:
                groups.append(WeightGroup(name, value, None, None))
            else:
                groups.append(WeightGroup(name, form.levels(value), 2.0 ** (form.qi - 1), form.bits))
        return groups


def _row(name: str, parameters: int, macs: int, frames: int) -> dict[str, Any]:
    return {"name": name, "parameters": parameters, "macs": macs * frames, "macs_per_frame": macs}


def _mean_over_time(z: Tensor, lengths: Tensor | None) -> Tensor:
    """[B, T, C] -> [B, C], over valid frames."""
    if lengths is None:
        return z.mean(1)
    ends = lengths.to(z.device)[:, None]  # [B, 1]
    valid = torch.arange(z.shape[1], device=z.device) < ends
    return (z * valid[..., None]).sum(1) / ends
