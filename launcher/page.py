"""The look of a report: one HTML page that loads nothing. Nothing about what it says."""

from __future__ import annotations

from html import escape

STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#161a22;--soft:#5d6675;
--line:#e3e6eb;--grid:#eceef2;--good:#12805c;--good-bg:#e2f5ec;--bad:#c2322b;--bad-bg:#fdecea;
--wait:#8f5b00;--wait-bg:#fdf2d9;--c0:#2f6bde;--c1:#d9730d;--c2:#0f9f7a;--c3:#8b53d6;--c4:#d23f81;
--c5:#5f7d0c}
@media(prefers-color-scheme:dark){:root{--page:#0f1217;--card:#171b22;--ink:#e8ebf0;
--soft:#98a2b3;--line:#2a303a;--grid:#232933;--good:#5fd3a6;--good-bg:#12332a;--bad:#ff8d85;
--bad-bg:#3b1a1a;--wait:#f2bf5c;--wait-bg:#362a10;--c0:#74a5ff;--c1:#ffa657;--c2:#4fd1ad;
--c3:#bd97ff;--c4:#ff86b7;--c5:#b5d256}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,
"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;-webkit-font-smoothing:antialiased}
main{max-width:1120px;margin:0 auto;padding:40px 24px 56px}
h1{font-size:27px;line-height:1.25;letter-spacing:-.015em;margin:0;font-weight:650;
overflow-wrap:anywhere}
h2{font-size:13px;font-weight:600;color:var(--soft);letter-spacing:.06em;text-transform:uppercase;
margin:40px 0 12px}
header{display:flex;gap:8px 14px;align-items:center;flex-wrap:wrap}
header p{flex-basis:100%;margin:2px 0 0;color:var(--soft);overflow-wrap:anywhere}
.chip{border-radius:99px;padding:3px 12px;font-size:13px;font-weight:600;white-space:nowrap;
color:var(--wait);background:var(--wait-bg)}
.chip.good{color:var(--good);background:var(--good-bg)}
.chip.bad{color:var(--bad);background:var(--bad-bg)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(160px,1fr));gap:12px;
margin:12px 0 0}
header+.tiles{margin-top:26px}
.facts{display:flex;flex-wrap:wrap;gap:10px 34px;margin:12px 0 0;padding:12px 16px;font-size:14px}
.facts dt{color:var(--soft);font-size:13px}.facts dd{margin:0;font-weight:600;overflow-wrap:anywhere}
.tile,figure,.card{background:var(--card);border:1px solid var(--line);border-radius:12px}
.tile{padding:13px 16px 12px;min-width:0}
.tile span,.tile small{display:block;color:var(--soft);font-size:13px;line-height:1.4;
overflow-wrap:anywhere}
.tile b{display:block;font-size:24px;font-weight:620;letter-spacing:-.02em;line-height:1.3;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.tile.main b{color:var(--c0)}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(440px,100%),1fr));gap:16px}
figure{margin:0;padding:14px 14px 8px;position:relative;min-width:0;display:flex;
flex-direction:column;justify-content:space-between}
figcaption{display:flex;flex-wrap:wrap;gap:2px 16px;justify-content:space-between;
padding:0 2px 8px 4px;font-size:14px}
figcaption b{font-weight:620}
.legend{display:flex;flex-wrap:wrap;gap:0 14px;color:var(--soft);font-size:12.5px}
.key{display:inline-flex;align-items:center;gap:6px;overflow-wrap:anywhere}
.key i{flex:none;width:14px;height:3px;border-radius:2px;background:currentColor}
.key.c0 i{background:var(--c0)}.key.c1 i{background:var(--c1)}.key.c2 i{background:var(--c2)}
.key.c3 i{background:var(--c3)}.key.c4 i{background:var(--c4)}.key.c5 i{background:var(--c5)}
.key.faint i{opacity:.4}
.key.mark i{width:3px;height:10px;background:var(--bad)}
.key.rule i{width:0;height:13px;background:none;border-left:2px dashed var(--soft);border-radius:0}
svg{display:block;width:100%;height:auto;overflow:visible;touch-action:pan-y}
svg text{fill:var(--soft);font-size:11.5px;font-variant-numeric:tabular-nums}
text.y{text-anchor:end}text.x{text-anchor:middle}
.grid{stroke:var(--grid);fill:none}.axis{stroke:var(--line);fill:none}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.line.faint{stroke-width:1;opacity:.32}
.line.c0{stroke:var(--c0)}.line.c1{stroke:var(--c1)}.line.c2{stroke:var(--c2)}
.line.c3{stroke:var(--c3)}.line.c4{stroke:var(--c4)}.line.c5{stroke:var(--c5)}
.dots{stroke:var(--card);stroke-width:1.2}
.dots.c0{fill:var(--c0)}.dots.c1{fill:var(--c1)}.dots.c2{fill:var(--c2)}
.dots.c3{fill:var(--c3)}.dots.c4{fill:var(--c4)}.dots.c5{fill:var(--c5)}
.mark{stroke:var(--bad);stroke-width:1.6;fill:none}
.rule{stroke:var(--soft);stroke-dasharray:3 4;fill:none;opacity:.8}
.cursor{stroke:var(--soft);stroke-width:1;opacity:.6}
.tip{position:absolute;pointer-events:none;background:var(--ink);color:var(--page);font-size:12px;
line-height:1.45;padding:6px 10px;border-radius:8px;white-space:pre;z-index:1;
font-variant-numeric:tabular-nums}
.card{overflow:auto}.card.long{max-height:600px}
.long thead th{position:sticky;top:0;background:var(--card);box-shadow:0 1px var(--line)}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:left;vertical-align:top;padding:9px 16px;border-top:1px solid var(--line);
overflow-wrap:anywhere}
thead th{border-top:0;font-size:12.5px;font-weight:600;color:var(--soft)}
tbody:first-child tr:first-child td{border-top:0}
td.name{font-weight:600;white-space:nowrap}td.why{color:var(--soft)}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.more{color:var(--soft);text-align:center}
tr.bad td.name{color:var(--bad)}tr.wait td.name{color:var(--wait)}
.verdict{border-left:4px solid var(--bad);padding:14px 18px}
.verdict p{margin:0 0 8px;font-weight:620;overflow-wrap:anywhere}
.verdict footer{margin:0}.verdict pre{margin:10px 0}
pre{margin:0;font:12.5px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",
monospace;white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4}
.verdict pre{max-height:520px;overflow:auto}
details>summary{cursor:pointer;padding:12px 16px;font-weight:600;font-size:14px}
details pre{padding:4px 16px 16px}
footer{color:var(--soft);font-size:13px;margin-top:36px;overflow-wrap:anywhere}
@media(max-width:560px){main{padding:24px 14px 40px}.tiles{grid-template-columns:1fr 1fr}
th,td{padding:8px 10px}}
@media print{body{background:#fff}.tile,figure{break-inside:avoid}.card.long{max-height:none}}
"""

# Reads the plotted points back from the SVG, so that no number stands in the page twice.
SCRIPT = """
for(const svg of document.querySelectorAll('svg[data-x]')){
const [x0,x1]=svg.dataset.x.split(' ').map(Number),[y0,y1]=svg.dataset.y.split(' ').map(Number);
const [,,w,h]=svg.getAttribute('viewBox').split(' ').map(Number),L=58,R=14,T=12,B=36;
const back={linear:v=>v,log:v=>10**v,log2:v=>2**v}[svg.dataset.scale];
const lines=[...svg.querySelectorAll('polyline')].map(p=>({label:p.dataset.label,
points:p.getAttribute('points').split(' ').map(q=>q.split(',').map(Number))}));
const cursor=document.createElementNS(svg.namespaceURI,'path');
cursor.setAttribute('class','cursor');
const tip=document.createElement('div');tip.className='tip';tip.hidden=true;
svg.append(cursor);svg.parentNode.append(tip);
svg.addEventListener('pointermove',e=>{const box=svg.getBoundingClientRect();
const x=(e.clientX-box.left)/box.width*w;
const near=lines.map(l=>l.points.reduce((a,b)=>Math.abs(b[0]-x)<Math.abs(a[0]-x)?b:a));
if(!near.length)return;
const at=near.reduce((a,b)=>Math.abs(b[0]-x)<Math.abs(a[0]-x)?b:a)[0];
const step=x0+(at-L)/(w-L-R)*(x1-x0);
const value=y=>{const v=back(y0+(h-B-y)/(h-T-B)*(y1-y0));
return Number(v.toPrecision(4)).toString()};
tip.textContent=['step '+Math.round(step).toLocaleString('en'),
...near.map((p,i)=>Math.abs(p[0]-at)<12?lines[i].label+'  '+value(p[1]):'')].filter(Boolean)
.join('\\n');
cursor.setAttribute('d','M'+at+' '+T+'V'+(h-B));tip.hidden=false;
const px=box.left-svg.parentNode.getBoundingClientRect().left+at/w*box.width;
tip.style.left=Math.min(px+12,svg.parentNode.clientWidth-tip.offsetWidth-6)+'px';
tip.style.top='64px'});
svg.addEventListener('pointerleave',()=>{tip.hidden=true;cursor.removeAttribute('d')});
}
"""

# The page may be mailed around: even if something hostile got in, a browser loads nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(title: str, body: str) -> str:
    """A whole document. `title` is text, `body` is HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
