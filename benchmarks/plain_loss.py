"""The dual loss written from Eq. 2 to 7 as one would first: pairs of views in a loop, targets gathered."""

import torch
import torch.nn.functional as F


def cross_entropy(p, log_q):
    "H(p, q) of Eq. 3 over the last dimension."
    return -(p * log_q).sum(-1)


def centers(w_geo, H, W):
    "Token centres [B, H*W, 2] of one view (Sec. 3.4.3)."
    ulx, uly, lrx, lry, _, _, f = w_geo.T[:, :, None]
    u = ((torch.arange(W) + 0.5) / W).expand(H, W).flatten()
    v = ((torch.arange(H) + 0.5) / H)[:, None].expand(H, W).flatten()
    return torch.stack([ulx + torch.where(f > 0.5, 1 - u, u) * (lrx - ulx), uly + v * (lry - uly)], -1)


def diagonal(w_geo, H, W):
    return (((w_geo[:, 2] - w_geo[:, 0]) / W) ** 2 + ((w_geo[:, 3] - w_geo[:, 1]) / H) ** 2).sqrt()


def plain_dual_loss(student, teacher, student_temp, teacher_temp, center_view, center_region):
    "-> {'view': L_G, 'region': L_L^geo}, from two `Outputs`; student tokens search (as the reference)."
    p_view = F.softmax((teacher.logits['view'] - center_view) / teacher_temp, -1)
    log_q_view = F.log_softmax(student.logits['view'] / student_temp, -1)
    sizes = lambda outputs: [H * W for H, W in outputs.grids]
    p_region = F.softmax((teacher.logits['region'] - center_region) / teacher_temp, -1).split(
        sizes(teacher), 1
    )
    log_q_region = F.log_softmax(student.logits['region'] / student_temp, -1).split(sizes(student), 1)
    view, region, pairs = 0.0, 0.0, 0
    for t, grid_t in enumerate(teacher.grids):
        for s, grid_s in enumerate(student.grids):
            if s == t:
                continue
            pairs += 1
            view = view + cross_entropy(p_view[:, t], log_q_view[:, s]).mean()
            w_s, w_t = student.w_geo[:, s], teacher.w_geo[:, t]
            d, k = torch.cdist(centers(w_s, *grid_s), centers(w_t, *grid_t)).min(-1)
            near = d < torch.maximum(diagonal(w_s, *grid_s), diagonal(w_t, *grid_t))[:, None] / 2
            target = p_region[t].gather(1, k[..., None].expand(-1, -1, p_region[t].shape[-1]))
            region = region + (near * cross_entropy(target, log_q_region[s])).mean()
    return {'view': view / pairs, 'region': region / pairs}
