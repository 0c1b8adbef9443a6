"""The style sheet of the report: light and dark by the reader's preference, a laptop's width, and paper."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f3f5f7; --paper: #ffffff; --ink: #1c2126; --muted: #5c6773; --line: #e0e5ea; --soft: #f4f7fa;
  --accent: #0067ab; --tint: #e6f1f9; --bar: #d9e9f5; --warm: #b35c00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0d1117; --paper: #161b22; --ink: #e6eaee; --muted: #9aa5b1; --line: #2b323b; --soft: #1b2129;
    --accent: #58aef0; --tint: #15293b; --bar: #1d3a55; --warm: #f0a04b;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 1rem; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
.frame {
  display: grid; grid-template-columns: 190px minmax(0, 1fr); gap: 28px; max-width: 1240px; margin: 0 auto;
  padding: 28px;
}
nav { position: sticky; top: 28px; align-self: start; font-size: 13.5px; }
nav strong { display: block; margin-bottom: 8px; }
nav a {
  display: block; padding: 4px 10px; color: var(--muted); text-decoration: none;
  border-left: 2px solid var(--line);
}
nav a:hover { color: var(--accent); border-color: var(--accent); }
header .eyebrow { color: var(--muted); font-size: 13px; margin: 0; }
header h1 {
  font-size: 25px; line-height: 1.25; margin: 6px 0 10px; letter-spacing: -0.01em; text-wrap: balance;
  max-width: 52rem;
}
header p.lead { margin: 0 0 4px; max-width: 50rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; margin: 20px 0 26px; }
.tile { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 13px 16px; }
.tile b {
  display: block; font-size: 21px; white-space: nowrap; line-height: 1.25; font-variant-numeric: tabular-nums;
  letter-spacing: -0.01em;
}
.tile span { display: block; color: var(--muted); font-size: 12.5px; line-height: 1.4; }
section {
  background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 20px 24px 22px;
  margin-bottom: 20px;
}
h2 { font-size: 19px; margin: 0 0 4px; letter-spacing: -0.005em; }
h3 { font-size: 14.5px; margin: 20px 0 6px; }
section > p { max-width: 50rem; }
p { margin: 6px 0 10px; }
p.intro { color: var(--muted); }
p.small, figcaption { color: var(--muted); font-size: 13px; max-width: 52rem; }
p.note {
  background: var(--soft); border-left: 3px solid var(--line); padding: 8px 12px; color: var(--muted);
  border-radius: 0 6px 6px 0;
}
figure { margin: 12px 0 18px; }
figure img { width: 100%; max-width: 920px; height: auto; display: block; }
figcaption { margin-top: 6px; }
.scroll { overflow-x: auto; margin: 6px 0 10px; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th {
  color: var(--muted); font-weight: 600; font-size: 12.5px; border-bottom: 1.5px solid var(--line);
  vertical-align: bottom;
}
tbody th { font-weight: 500; min-width: 130px; }
tbody th.ours { color: var(--accent); font-weight: 650; }
tbody th.reference { color: var(--muted); font-style: italic; font-weight: 400; }
tbody tr:hover { background: var(--soft); }
td strong { font-weight: 750; }
.drop, .under { color: var(--muted); font-size: 12px; font-weight: 400; }
.under { display: block; font-style: normal; line-height: 1.3; }
td.bar {
  background: linear-gradient(var(--bar) 0 0) no-repeat 10px 9px / calc((100% - 66px) * var(--share)) 15px;
  min-width: 150px;
}
thead tr + tr th:first-child { text-align: right; }
thead th[rowspan] { border-bottom: 1.5px solid var(--line); }
thead th[colspan] { text-align: center; border-bottom: 0; padding-bottom: 0; }
table.ranking { font-size: 12.5px; }
table.ranking th, table.ranking td { padding: 5px 7px; }
table.ranking td.words { text-align: left; white-space: normal; min-width: 92px; }
table.ranking th:nth-child(2), table.ranking th:nth-child(3) { text-align: left; }
table.narrow { width: auto; min-width: 60%; }
table.used td, table.stages td { white-space: normal; overflow-wrap: anywhere; }
table.used td { text-align: left; }
table.used th { text-align: left; }
table.used td:last-child:not(:nth-child(2)) { color: var(--muted); font-size: 12px; }
details { border-top: 1px solid var(--line); padding: 7px 0; }
details:last-child { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; color: var(--accent); font-size: 13.5px; }
code { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
footer { color: var(--muted); font-size: 12.5px; padding: 4px 2px 30px; }
@media (max-width: 960px) { .frame { grid-template-columns: minmax(0, 1fr); padding: 16px; } nav { display: none; } }
@media print {
  nav { display: none; } .frame { display: block; padding: 0; max-width: none; }
  section { border: 0; padding: 0 0 12px; } figure, tr { break-inside: avoid; }
}
""".strip()
