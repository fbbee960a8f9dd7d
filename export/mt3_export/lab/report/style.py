"""The style sheet of the report: light and dark, phone and desktop, screen and paper."""

from __future__ import annotations

from mt3_export.lab.report.markup import Markup

STYLE = Markup("""
:root{color-scheme:light dark;--paper:#f5f6f4;--card:#fff;--ink:#17201d;--soft:#56625d;--rule:#dde2df;--faint:#eceeed;
--accent:#0b6b58;--fill:#0b6b58;--wash:#e3f1ec;--bad:#b3261e;--ref:#3a4541;--h0:#2360c4;--h1:#7d45c2;--h2:#b25200;
--h3:#23783f;
--h4:#bd2d63;--h5:#0a7288;--h6:#776000;--h7:#79523f;
--sans:ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Noto Sans",Arial,sans-serif;
--serif:ui-serif,"Iowan Old Style","Palatino Linotype",Palatino,"Book Antiqua",Georgia,serif;
--mono:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
@media (prefers-color-scheme:dark){:root{--paper:#101513;--card:#171e1b;--ink:#e6ece9;--soft:#98a6a0;--rule:#2b3531;
--faint:#1f2824;--accent:#57cdb0;--fill:#0d6554;--wash:#173028;--bad:#ff8a80;--ref:#c3cec9;--h0:#7fb0ff;--h1:#c19bff;
--h2:#ffa45c;
--h3:#6fce8c;--h4:#ff8ab0;--h5:#58cbe2;--h6:#dcc04a;--h7:#d0a48d}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth;scroll-padding-top:3.5rem}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 var(--sans);overflow-wrap:break-word}
main{max-width:1040px;margin:0 auto;padding:3.5rem 24px 5rem}
h1,h2,.choice,.sentence{font-family:var(--serif);font-weight:600;letter-spacing:-.012em;text-wrap:balance}
h1{font-size:clamp(2.1rem,5vw,3.2rem);line-height:1.08;margin:.1em 0 .3em}
h2{font-size:1.7rem;line-height:1.2;margin:0 0 1.1rem}
h3,h4{font-size:.95rem;line-height:1.35;margin:0 0 .3rem}
h4{font-weight:600;margin:0 0 .1rem}
p{margin:0 0 .6rem}
a{color:var(--accent)}
code{font-family:var(--mono);font-size:.86em;overflow-wrap:anywhere}
:focus-visible{outline:2px solid var(--accent);outline-offset:3px;border-radius:4px}
.over{font-size:.74rem;letter-spacing:.11em;text-transform:uppercase;color:var(--soft);margin:0;font-weight:600}
.lead{color:var(--soft);max-width:68ch;margin-bottom:.4rem}
header details{margin-bottom:1.6rem}
.note{color:var(--soft);font-size:.9rem;max-width:78ch}
.verdict{background:var(--card);border:1px solid var(--rule);border-radius:14px;display:grid;overflow:hidden;
grid-template-columns:minmax(11rem,max-content) 1fr}
.verdict .pick{background:var(--fill);color:#fff;padding:1.9rem 2rem;display:flex;flex-direction:column;
justify-content:center;min-width:0}
.verdict .pick .over{color:inherit;opacity:.85}
.choice{font-size:clamp(2.6rem,6vw,3.6rem);line-height:1.1;margin:.1em 0 0;overflow-wrap:anywhere}
.where{margin:0;font-size:1.05rem}
.words{padding:1.8rem 2rem 1.3rem;min-width:0}
.sentence{font-size:1.28rem;line-height:1.42;font-weight:500;margin:0 0 .8rem;text-wrap:pretty}
.words ul{margin:0 0 .8rem;padding-left:1.1rem;color:var(--soft);font-size:.94rem}
.figures{grid-column:1/-1;margin:0;display:flex;flex-wrap:wrap;border-top:1px solid var(--rule)}
.figures div{flex:1 1 9.5rem;padding:1rem 1.4rem 1.1rem;box-shadow:-1px 0 0 var(--rule)}
.figures dd{margin:0;font-size:1.55rem;font-weight:600;font-variant-numeric:tabular-nums;line-height:1.25}
.figures div{display:flex;flex-direction:column}
.figures dt{font-size:.84rem;color:var(--soft);line-height:1.35}
details{font-size:.92rem;color:var(--soft);margin:.2rem 0 .6rem}
summary{cursor:pointer;color:var(--accent);width:max-content;max-width:100%}
details p{margin:.5rem 0;max-width:74ch}
.purposes{list-style:none;margin:1.1rem 0 0;padding:0;display:grid;gap:.9rem;
grid-template-columns:repeat(auto-fit,minmax(15rem,1fr))}
.purposes li{border-top:2px solid var(--rule);padding:.75rem .2rem 0}
.purposes h3{font-weight:500;color:var(--soft);font-size:.88rem;margin:0}
.purposes p{font-size:.9rem;margin:0;color:var(--soft)}
.purposes .which{font-size:1.1rem;font-weight:600;color:var(--ink);margin:.1rem 0 .2rem}
nav{position:sticky;top:0;z-index:5;background:var(--paper);margin:2.6rem -24px 0;padding:.75rem 24px;display:flex;
gap:.2rem 1.35rem;overflow-x:auto;white-space:nowrap;border-bottom:1px solid var(--rule);font-size:.88rem;
scrollbar-width:none}
nav a{text-decoration:none;color:var(--soft)}
nav a:hover{color:var(--accent);text-decoration:underline}
.block{padding-top:3.2rem}
.block>figure:last-child{margin-bottom:0}
figure{margin:0 0 2.2rem;
background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:1.3rem 1.5rem 1.2rem}
figcaption{margin-bottom:1.1rem;max-width:82ch}
figcaption b{display:block;font-size:1.04rem;line-height:1.35}
figcaption span{font-size:.9rem;color:var(--soft)}
figure>details:last-child,figure>.note:last-child{margin-bottom:0}
svg{display:block;width:100%;height:auto;font-family:var(--sans);overflow:visible}
.narrow{display:none}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:1.4rem 2rem}
.grid svg{max-width:520px}
.ref{--c:var(--ref)}.h0{--c:var(--h0)}.h1{--c:var(--h1)}.h2{--c:var(--h2)}.h3{--c:var(--h3)}
.h4{--c:var(--h4)}.h5{--c:var(--h5)}.h6{--c:var(--h6)}.h7{--c:var(--h7)}
svg text{font-variant-numeric:tabular-nums}
svg .grid{stroke:var(--rule);stroke-width:1}
svg .tick{fill:var(--soft)}
svg .axis{fill:var(--soft);font-style:italic}
svg .layer{fill:var(--ink)}
svg .head{fill:var(--soft);font-weight:600}
svg .name{fill:var(--c);font-weight:600}
svg .dot{fill:var(--c);stroke:var(--card);stroke-width:1.5}
svg .hollow{fill:var(--card);stroke:var(--c);stroke-width:2}
svg .ring{fill:none;stroke:var(--c);stroke-width:2}
svg .bar{stroke:var(--c);stroke-width:2.5;stroke-linecap:round;opacity:.55}
svg .leader{stroke:var(--c);stroke-width:1;opacity:.5}
svg .trace{fill:none;stroke:var(--c);stroke-width:1.2;opacity:.55}
svg .curve{stroke-width:2.2;opacity:1;stroke-linejoin:round}
svg .rug{stroke:var(--c);stroke-width:1.2;opacity:.55;fill:none}
svg .cross{stroke:var(--c);stroke-width:2.4;fill:none}
svg .zero{stroke:var(--soft);stroke-width:1}
svg line.allowed{stroke:var(--bad);stroke-width:1.5;stroke-dasharray:5 4}
svg text.allowed{fill:var(--bad)}
svg .strip{fill:var(--faint)}
svg .largest{fill:var(--soft)}svg rect.largest{opacity:.5}
.scroll{overflow-x:auto;max-width:100%;-webkit-overflow-scrolling:touch}
.block>.scroll{background:var(--card);border:1px solid var(--rule);border-radius:12px;margin-bottom:1rem}
table{border-collapse:separate;border-spacing:0;font-size:.9rem;font-variant-numeric:tabular-nums;min-width:100%}
th,td{padding:.62rem .8rem;text-align:right;vertical-align:top;white-space:nowrap;border-bottom:1px solid var(--rule)}
tbody:last-child tr:last-child>*{border-bottom:0}
thead th{font-weight:500;color:var(--soft);font-size:.82rem;vertical-align:bottom}
th.group{text-align:left;font-weight:600;color:var(--ink);border-left:1px solid var(--rule)}
.start{border-left:1px solid var(--rule)}
th.name{text-align:left;position:sticky;left:0;background:var(--card);z-index:1;font-weight:600}
tbody th.group{border-left:0;background:var(--faint);font-size:.86rem}
th.name small{display:inline;font-weight:400}
.summary th.name .pill{display:table;margin:.3rem 0 0 1.15rem}
td small,th small{display:block;color:var(--soft);font-size:.78rem;line-height:1.45}
td .number,td .best{font-size:.95rem}
.best{font-weight:700;color:var(--accent);
text-decoration:underline;text-underline-offset:3px;text-decoration-thickness:2px}
.none{color:var(--soft)}
tr.chosen>*{background:var(--wash)}
td.problem{text-align:left;white-space:normal}
.why{position:sticky;left:11rem;max-width:34rem;color:var(--soft);overflow-wrap:anywhere}
.why b,.bad{color:var(--bad)}
tr.undone th.name{color:var(--soft)}
.swatch{display:inline-block;width:.66em;height:.66em;border-radius:50%;background:var(--c);margin-right:.5em}
.pill{display:inline-block;font-size:.72rem;font-weight:600;line-height:1.5;padding:0 .5em;border-radius:9px;
background:var(--faint);color:var(--soft)}
.pill.pick{background:var(--fill);color:#fff}
.pill.again{color:var(--bad)}
.before{display:flex;flex-wrap:wrap;gap:.8rem 2.6rem;margin:0 0 1.2rem}
.before dt{font-size:.86rem;color:var(--soft)}
.before dd{margin:0;font-size:1.5rem;font-weight:600;line-height:1.3;font-variant-numeric:tabular-nums}
.before dd.small{font-size:.86rem;font-weight:400;color:var(--soft)}
.before .after dd:first-of-type{color:var(--accent)}
.suspects{list-style:none;margin:0 0 1rem;padding:0;font-size:.92rem}
.suspects li{display:grid;grid-template-columns:minmax(0,22rem) 1fr 8.5rem;
gap:.2rem 1rem;align-items:center;padding:.22rem 0}
.suspects small{color:var(--soft)}
.suspects .what{overflow-wrap:anywhere}
.track{height:.85rem;display:block}
.track i{display:block;height:100%;min-width:2px;border-radius:3px;border:1.5px solid var(--accent)}
.kept .track i{background:var(--accent)}
.kept .what{font-weight:600}
.suspects .value{text-align:right;font-variant-numeric:tabular-nums}
.roll{border:1px solid var(--rule);border-radius:8px;background:#fff}
.roll img{display:block;max-width:none}
.fit{accent-color:var(--accent);margin:0 .45rem .7rem 0;vertical-align:middle}
.fit+label{font-size:.88rem;color:var(--soft);vertical-align:middle;position:relative;top:-.35rem;cursor:pointer}
.fit:checked~.roll img{max-width:100%;height:auto}
dl.terms,dl.facts{display:grid;grid-template-columns:minmax(7.5rem,max-content) minmax(0,1fr);gap:.5rem 1.6rem;
margin:0 0 1.6rem;font-size:.94rem}
dl.terms dt,dl.facts dt{font-weight:600}
dl.terms dd,dl.facts dd{margin:0;color:var(--soft);max-width:74ch;overflow-wrap:anywhere}
.block>ul{margin:.4rem 0;padding-left:1.2rem;font-size:.94rem;color:var(--soft)}
@media screen and (max-width:759px){main{padding:2rem 18px 4rem}nav{margin:2rem -18px 0;padding:.7rem 18px}
.wide{display:none}.narrow{display:block;max-width:560px;margin:0 auto}.verdict{grid-template-columns:1fr}
.verdict .pick{padding:1.3rem 1.3rem 1.4rem}.words{padding:1.3rem 1.3rem .9rem}.sentence{font-size:1.14rem}
.figures div{padding:.8rem 1.3rem;flex-basis:8.5rem}.figures dd{font-size:1.3rem}
figure{padding:1.1rem 18px 1rem;margin-left:-18px;margin-right:-18px;border-radius:0;border-left:0;border-right:0}
.suspects li{grid-template-columns:1fr auto}.suspects .track{grid-column:1/-1;grid-row:2}
dl.terms,dl.facts{grid-template-columns:1fr;gap:.1rem}dl.terms dd,dl.facts dd{margin-bottom:.7rem}
th,td{padding:.55rem .65rem}.why{left:9rem;max-width:12rem}.block{padding-top:2.6rem}}
@media print{:root{--paper:#fff;--card:#fff;--ink:#000;--soft:#444;--rule:#ccc;--faint:#f2f2f2;--accent:#0b6b58;
--fill:#0b6b58;
--wash:#e8f3ef;--bad:#b3261e;--ref:#3a4541;--h0:#2360c4;--h1:#7d45c2;--h2:#b25200;--h3:#23783f;--h4:#bd2d63;
--h5:#0a7288;
--h6:#776000;--h7:#79523f}body{font-size:10.5pt;print-color-adjust:exact;-webkit-print-color-adjust:exact}
main{max-width:none;padding:0}.grid{grid-template-columns:1fr 1fr}.best{text-decoration:none}
nav,.fit,.fit+label{display:none}.wide{display:block}.narrow{display:none}
.verdict{grid-template-columns:max-content 1fr}figure,.verdict,.purposes li,tr{break-inside:avoid}h2{break-after:avoid}
.scroll{overflow:visible}.roll img{max-width:100%;height:auto}th.name{position:static}.why{position:static}
#summary{page:wide}.summary td,.summary th{white-space:normal}.summary{font-size:5.6pt}
.summary th,.summary td{padding:2pt 2.5pt}.summary small{font-size:4.8pt}
.summary td .number,.summary td .best{font-size:6pt}.summary thead th,.summary .pill{font-size:5pt}}
@page{margin:14mm}
@page wide{size:landscape}
""")
