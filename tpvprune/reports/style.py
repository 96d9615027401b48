"""The style sheet of the HTML report: one column on a phone, two on a screen."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fcfbf9; --ink: #1c1e21; --soft: #666b70; --line: #e3e0da; --edge: #cbc6bc;
    --fill: #f3f1ec;
  --kept: #0e6f66;
  --gone: #c2792b; --kept-soft: #0e6f661f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #131518; --ink: #e9e7e3; --soft: #989da3; --line: #2b2f34; --edge: #41474e;
    --fill: #1b1e22;
    --kept: #56b9ac;
    --gone: #dd9d55; --kept-soft: #56b9ac26;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%;
}
main { max-width: 70rem; margin: 0 auto;
  padding: clamp(2rem, 6vw, 5rem) clamp(1.25rem, 4vw, 3rem); }
h1 { font-size: clamp(1.65rem, 4.2vw, 2.5rem); line-height: 1.15; letter-spacing: -.022em;
  font-weight: 640; margin: 0; max-width: 22em; text-wrap: balance; overflow-wrap: anywhere; }
h2 { font-size: 1.0625rem; font-weight: 620; letter-spacing: -.005em; margin: 0 0 .4rem; }
p { margin: 0 0 .75rem; }
.lead { font-size: 1.125rem; color: var(--soft); max-width: 38em; margin: 1rem 0 0; }
.lead strong { color: var(--ink); font-weight: 560; }
.warn { border-left: 3px solid var(--gone); padding: .1rem 0 .1rem .9rem; margin: 1.5rem 0 0;
  max-width: 44em; }
code, pre, .name { font-family: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas,
  "DejaVu Sans Mono", monospace; font-size: .8125rem; }
section { display: grid; gap: 1rem 3.5rem; border-top: 1px solid var(--line);
  padding: 1.5rem 0 2.75rem; }
section > * { min-width: 0; }
.about p { color: var(--soft); font-size: .875rem; line-height: 1.5; margin: 0 0 .6rem; }
@media (min-width: 60rem) { section:not(.across) { grid-template-columns: 14.5rem 1fr; } }

.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr));
  gap: 2rem 2rem; margin: 3rem 0 3.5rem; padding: 0; }
.figures div { min-width: 0; }
.figures dt { color: var(--soft); font-size: .875rem; }
.figures dd { margin: 0; }
.figures .big { font-size: 2.125rem; line-height: 1.2; letter-spacing: -.025em; font-weight: 600; }
.figures .big small { font-size: 1.125rem; font-weight: 500; letter-spacing: 0;
  margin-left: .12em; }
.figures .sub { color: var(--soft); font-size: .8125rem; line-height: 1.4; }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; }
th { font-weight: 500; color: var(--soft); font-size: .8125rem; text-align: right;
  padding: 0 0 .4rem 1.5rem; white-space: nowrap; vertical-align: bottom; }
td { text-align: right; padding: .42rem 0 .42rem 1.5rem; border-top: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tbody th { color: var(--ink); font-size: inherit; padding: .42rem 0;
  border-top: 1px solid var(--line); }
@media (max-width: 40rem) { table { font-size: .8125rem; }
  th, td { padding-left: .7rem; } th { font-size: .75rem; } tbody th { white-space: normal; } }
tr.ours td, tr.ours th { color: var(--kept); font-weight: 600; }
td .soft, .soft { color: var(--soft); font-weight: 400; }

.rows { list-style: none; margin: 0; padding: 0; }
.rows li { display: grid; grid-template-columns: minmax(6rem, 10.5rem) 1fr 5.2rem; gap: .75rem;
  align-items: center; height: 1.5rem; break-inside: avoid; }
.rows .name { color: var(--soft); font-size: .75rem; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.rows .num { font-size: .8125rem; text-align: right; white-space: nowrap; }
.track { display: block; height: .625rem; }
.dense { display: block; height: 100%; border-radius: 2px; background: var(--fill);
  box-shadow: inset 0 0 0 1px var(--edge); min-width: 3px; }
.stays { display: block; height: 100%; border-radius: 2px; background: var(--kept);
  min-width: 2px; }
.rows .gap { margin-top: .6rem; }
.rows.plain .stays { background: var(--soft); opacity: .55; }
.rows.plain .chosen .stays { background: var(--kept); opacity: 1; }
.rows.plain .chosen .name { color: var(--kept); font-weight: 600; }
@media (min-width: 48rem) { .rows.two { columns: 2; column-gap: 2.5rem; }
  .rows.two li { grid-template-columns: minmax(5rem, 9rem) 1fr 5.2rem; } }

svg { display: block; width: 100%; overflow: visible; }
svg text { font-size: 11px; fill: var(--soft); font-family: inherit; }
svg .value { fill: var(--ink); font-size: 12px; font-weight: 560; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .kept-line { stroke: var(--kept); stroke-width: 2; stroke-linecap: round; }
svg .gone-line { stroke: var(--gone); stroke-width: 2; stroke-linecap: round; }
svg .kept-dot { fill: var(--kept); } svg .gone-dot { fill: var(--gone); }
svg .kept-bar { stroke: var(--kept); opacity: .6; } svg .gone-bar { stroke: var(--gone);
  opacity: .6; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr));
  gap: 1.25rem 1.25rem; }
.panels figure { margin: 0; min-width: 0; }
.panels figcaption { display: flex; justify-content: space-between; gap: .5rem;
  margin-bottom: .15rem;
  font-size: .75rem; color: var(--soft); }
.panels figcaption .name { font-size: .6875rem; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; direction: rtl; text-align: left; }
.key { display: inline-flex; align-items: center; gap: .4em; margin-right: 1em;
  white-space: nowrap; }
.key::before { content: ""; width: .55em; height: .55em; border-radius: 50%;
  background: var(--kept); }
.key.gone::before { background: var(--gone); }
.key.outline::before { background: var(--fill); box-shadow: inset 0 0 0 1px var(--soft); }

.wide .rows li { grid-template-columns: minmax(4.5rem, 12rem) 1fr 7rem; }
@media (max-width: 40rem) { .wide .rows li { grid-template-columns: 5.5rem 1fr 6.6rem; } }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr));
  gap: 1.25rem 1rem; }
.pictures figure { margin: 0; min-width: 0; }
.pictures img { display: block; width: 6rem; height: 6rem; object-fit: contain;
  object-position: left; image-rendering: pixelated; background: var(--fill); }
.pictures figcaption { font-size: .75rem; line-height: 1.4; margin-top: .35rem; }
.pictures figcaption > span { display: block; overflow-wrap: anywhere; }
.pictures .now { color: var(--gone); }

.reasons { list-style: none; margin: 0; padding: 0; font-size: .9375rem; }
.reasons li { padding: .5rem 0; border-top: 1px solid var(--line); overflow-wrap: anywhere; }
.reasons li:first-child { border-top: 0; padding-top: 0; }
.reasons .name { color: var(--soft); display: block; line-height: 1.6; }
pre { background: var(--fill); border-radius: 6px; padding: .9rem 1rem; margin: 0 0 1.5rem;
  white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.55; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr));
  gap: 1.75rem 3.5rem;
  font-size: .875rem; }
.facts h3 { font-size: .8125rem; font-weight: 500; color: var(--soft); margin: 0 0 .3rem; }
.facts dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem 1rem; margin: 0; }
.facts dt { color: var(--soft); overflow-wrap: anywhere; }
.facts dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
footer { border-top: 1px solid var(--line); padding-top: 1rem; color: var(--soft);
  font-size: .8125rem; }
@media print { body { background: none; } section { break-inside: avoid; } }
"""

_HUES = (174, 28, 212, 330, 48, 264, 96, 8, 190, 300)


def hues(num: int) -> str:
    """Return CSS that gives the classes ``c0``, ``c1``, ... a colour ``--c``, light and dark."""
    light, dark = [], []
    for i in range(num):
        # Past ten hues come again, darker.
        again, hue = i >= len(_HUES), _HUES[i % len(_HUES)]
        light.append(f".c{i} {{ --c: hsl({hue} 62% {24 if again else 42}%); }}")
        dark.append(f".c{i} {{ --c: hsl({hue} 55% {82 if again else 62}%); }}")
    return "\n".join([*light, "@media (prefers-color-scheme: dark) {", *dark, "}"])
