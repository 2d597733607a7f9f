"""The pictures: samples of responses and showers, histograms, the course of a training."""
import numpy as np

from files import first_host_only, write_atomic

CHANNEL_NAMES = ("x < 0, y < 0", "x < 0, y > 0", "x > 0, y < 0", "x > 0, y > 0", "common")


def _figure(rows, columns, width, height, **options):
    """A matplotlib figure and its (rows, columns) axes, each width x height inches, without global state."""
    from matplotlib.figure import Figure  # 0.5 s to import: only where something is drawn
    figure = Figure(figsize=(columns * width + 1, rows * height + 0.5), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


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
    colours = colormaps["inferno"].with_extremes(bad="black")
    for column, title in enumerate(titles):
        peak = max(np.max(responses[column]) for responses in rows.values())
        norm = LogNorm(0.5, max(peak, 2))  # from 0.5, so that a single photon is not black
        for axis, (name, responses) in zip(axes[:, column], rows.items()):
            picture = np.asarray(responses[column]).T  # (H, W) is (x, y)
            image = axis.imshow(picture, norm=norm, origin="lower", cmap=colours)
            axis.set(xticks=[], yticks=[], ylabel=name if column == 0 else "")
        axes[0, column].set_title(title, fontsize=8)
        bar = figure.colorbar(image, ax=axes[:, column], location="bottom", aspect=12, ticks=(1, 10, 100),
                              format="%d")
        bar.set_label("photons", fontsize=8)
        bar.minorticks_off()
    _save_figure(path, figure)


def _compare(above, below, real, generated, bins, xlabel):
    """Draw histograms of real (N,) and generated (M,) values in equal bins, and below the ratio model / data.

    The outer bins also hold what lies beyond. Around the ratio, the grey band is the statistical error of the
    data and the bars are that of the model.
    """
    inside = (np.clip(values, bins[0], bins[-1]) for values in (real, generated))
    counts = np.array([np.histogram(values, bins)[0] for values in inside])
    data, model = counts / (np.maximum(counts.sum(axis=1, keepdims=True), 1) * (bins[1] - bins[0]))
    above.stairs(data, bins, fill=True, color="0.75", label="data")
    above.stairs(model, bins, label="model")
    above.set(yscale="log", ylim=(0.5 * data[data > 0].min(), 3 * max(data.max(), model.max())))
    errors = 1 / np.sqrt(np.maximum(counts, 1))  # relative, of Poisson numbers
    band, both = np.where(data > 0, errors[0], 0), (data > 0) & (model > 0)
    middle, ratio = (bins[1:] + bins[:-1])[both] / 2, model[both] / data[both]
    below.stairs(1 + band, bins, baseline=1 - band, fill=True, color="0.75")
    below.errorbar(middle, ratio, ratio * errors[1, both], fmt=".", markersize=3, linewidth=0.8)
    below.axhline(1, color="0.4", linewidth=0.8)
    below.set(xlabel=xlabel, ylim=(0, 2))


def plot_channels(path, real, generated):
    """Draw histograms of the five channels, photon sums (N, 5), as [FM, Fig. 9], and the ratio model / data;
    the bins follow the real data."""
    figure, axes = _figure(2, len(CHANNEL_NAMES), 2.3, 1.8, sharex="col", height_ratios=(5, 2))
    columns = np.asarray(real).T, np.asarray(generated).T
    for (above, below), name, *sums in zip(axes.T, CHANNEL_NAMES, *columns):
        _compare(above, below, *sums, np.linspace(0, 1.1 * max(sums[0].max(), 1), 61), "photons")
        above.set_title(name)
    axes[0, 0].set_ylabel("density")
    axes[1, 0].set_ylabel("ratio")
    axes[0, 0].legend(loc="upper right")
    _save_figure(path, figure)


def plot_sheet(path, panels, weights):
    """Draw one sheet on showers: histograms of `panels`, {label: (real values, generated values, edges of the
    bins)}, with the ratio model / data, and the weights {"log10_w": edges, "real", "generated": shares}."""
    figure, axes = _figure(4, (len(panels) + 2) // 2, 2.3, 1.8, height_ratios=(5, 2, 5, 2))
    pairs = [*zip(axes[0], axes[1]), *zip(axes[2], axes[3])]
    for (above, below), (label, (real, generated, bins)) in zip(pairs, panels.items()):
        _compare(above, below, real, generated, bins, label)
    above, below = pairs[len(panels)]
    edges, real, generated = (np.array(weights[name]) for name in ("log10_w", "real", "generated"))
    above.stairs(real, edges, fill=True, color="0.75")
    above.stairs(generated, edges)
    above.set(yscale="log")
    ratio = generated / np.where(real > 0, real, np.nan)
    below.plot((edges[1:] + edges[:-1]) / 2, ratio, ".", markersize=3)
    below.axhline(1, color="0.4", linewidth=0.8)
    below.set(xlabel=r"$\log_{10} w$ of the classifier", ylim=(0, 2))
    for above, below in pairs:
        below.sharex(above)
        above.tick_params(labelbottom=False)
    for row, label in enumerate(("density", "ratio") * 2):
        axes[row, 0].set_ylabel(label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    _save_figure(path, figure)


def plot_showers(path, rows, titles, calorimeter):
    """Draw showers, a column for each of `titles`, as three projections, summed over r, the angle or the
    layers, of each entry of `rows`, {"data": (K, Z, A, R) MeV, "model": ...}. Colours are logarithmic and
    shared in a column; no energy is black."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    layers, angles, _ = calorimeter.shape
    depth, turn, radius = np.arange(layers + 1), np.linspace(-np.pi, np.pi, angles + 1), calorimeter.edges
    views = ((3, depth, turn, "layer", "angle"), (2, depth, radius, "layer", "r / mm"),
             (1, turn, radius, "angle", "r / mm"))
    figure, axes = _figure(len(views) * len(rows), len(titles), 2.6, 1.2)
    colours = colormaps["inferno"].with_extremes(bad="black")
    for column, title in enumerate(titles):
        peak = max(1, *(showers[column].sum(axis=k).max() for showers in rows.values() for k in range(3)))
        norm, panels = LogNorm(peak / 1e5, peak, clip=True), iter(axes[:, column])
        for summed, x, y, xlabel, ylabel in views:
            for name, showers in rows.items():
                axis, picture = next(panels), showers[column].sum(axis=summed - 1)
                image = axis.pcolormesh(x, y, np.ma.masked_equal(picture, 0).T, norm=norm, cmap=colours)
                axis.set_ylabel(f"{name}\n{ylabel}" if column == 0 else "")
            axis.set_xlabel(xlabel)
        axes[0, column].set_title(title)
        figure.colorbar(image, ax=axes[:, column], location="bottom", aspect=30).set_label("MeV")
    _save_figure(path, figure)


@first_host_only
def plot_training(path, records):
    """Draw every number in the `records` of a log (see `read_log`), at least one, against the step."""
    names = [name for name in dict.fromkeys(key for record in records for key in record) if name != "step"]
    figure, axes = _figure(1, len(names), 3, 2.4)
    for axis, name in zip(axes[0], names):
        known = [record for record in records if isinstance(record.get(name), (int, float))]
        steps, values = zip(*((record["step"], record[name]) for record in known))
        axis.plot(steps, values, marker="." if len(values) < 20 else "")
        axis.set(title=name, xlabel="step")
    _save_figure(path, figure)
