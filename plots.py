"""The pictures: samples of responses, channel sums, the course of a training."""
import numpy as np

from common import first_host_only, write_atomic

CHANNEL_NAMES = ("x < 0, y < 0", "x < 0, y > 0", "x > 0, y < 0", "x > 0, y > 0", "common")


def _figure(rows, columns, width, height):
    """A matplotlib figure and its (rows, columns) axes, each width x height inches, without any global state."""
    from matplotlib.figure import Figure  # 0.5 s to import: only where something is drawn
    figure = Figure(figsize=(columns * width + 1, rows * height + 0.5), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


@first_host_only
def _save_figure(path, figure):
    with write_atomic(path) as temporary:
        figure.savefig(temporary, dpi=120)


def plot_samples(path, rows, titles):
    """Draw responses, one row of pictures for each entry of `rows`, {"data": (K, H, W) counts, "model": ...}.

    `titles`: K texts above the columns. Colours are logarithmic and shared in a column; no photon is black.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    _, height, width = np.shape(next(iter(rows.values())))
    figure, axes = _figure(len(rows), len(titles), 1.7, 1.7 * width / height)
    for column, title in enumerate(titles):
        peak = max(np.max(responses[column]) for responses in rows.values())
        norm = LogNorm(0.5, max(peak, 2))  # from 0.5, so that a single photon is not black
        for axis, (name, responses) in zip(axes[:, column], rows.items()):
            image = axis.imshow(np.asarray(responses[column]).T, norm=norm, origin="lower",  # (H, W) is (x, y)
                                cmap=colormaps["inferno"].with_extremes(bad="black"))
            axis.set(xticks=[], yticks=[], ylabel=name if column == 0 else "")
        axes[0, column].set_title(title, fontsize=8)
        bar = figure.colorbar(image, ax=axes[:, column], location="bottom", aspect=12, ticks=(1, 10, 100), format="%d")
        bar.set_label("photons", fontsize=8)
        bar.minorticks_off()
    _save_figure(path, figure)


def plot_channels(path, real, generated):
    """Draw the histograms of the five channels, (N, 5) photon sums each, as Fig. 9 of the flow matching paper
    (Wojnar).

    The bins follow the real data; the last one also holds what the model put beyond.
    """
    figure, axes = _figure(1, len(CHANNEL_NAMES), 2.6, 2.4)
    for axis, name, a, b in zip(axes[0], CHANNEL_NAMES, np.asarray(real).T, np.asarray(generated).T):
        bins = np.linspace(0, 1.1 * max(a.max(), 1), 61)
        axis.hist(a, bins, density=True, log=True, color="0.75", label="data")
        axis.hist(np.clip(b, 0, bins[-1]), bins, density=True, log=True, histtype="step", label="model")
        axis.set(title=name, xlabel="photons")
    axes[0, 0].set_ylabel("density")
    axes[0, 0].legend()
    _save_figure(path, figure)


@first_host_only
def plot_training(path, records):
    """Draw every number in the `records` of a log (see `read_log`), at least one, against the step, one panel each."""
    names = [name for name in dict.fromkeys(key for record in records for key in record) if name != "step"]
    figure, axes = _figure(1, len(names), 3, 2.4)
    for axis, name in zip(axes[0], names):
        values = [(record["step"], record[name]) for record in records if isinstance(record.get(name), (int, float))]
        axis.plot(*zip(*values), marker="." if len(values) < 20 else "")
        axis.set(title=name, xlabel="step")
    _save_figure(path, figure)
