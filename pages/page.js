// A page keeps where its reader was, and reloads itself while its run goes on.
(() => {
  'use strict';
  const live = JSON.parse(document.getElementById('live').textContent);
  const name = (key) => `${key} ${location.pathname}`;
  const keep = (key, value) => { try { sessionStorage.setItem(name(key), value); } catch { /* not allowed here */ } };
  const kept = (key) => { try { return sessionStorage.getItem(name(key)); } catch { return null; } };

  const details = document.getElementById('all');
  details.open = kept('open') === 'true';
  const place = JSON.parse(kept('place') || 'null'); // [the part that the reader looked at, its distance from the top]
  keep('place', '');
  if (place) {
    addEventListener('load', () => scrollBy(0, document.getElementById(place[0]).getBoundingClientRect().top - place[1]));
  }

  const video = document.querySelector('video');
  if (video && !matchMedia('(prefers-reduced-motion: reduce)').matches) video.play().catch(() => {});

  if (live.every === null) return;
  const box = document.getElementById('reload');
  const news = document.getElementById('news');
  box.checked = kept('reload') !== 'false';
  box.addEventListener('change', () => keep('reload', box.checked));
  let touched = 0; // when the reader last did something
  for (const kind of ['pointerdown', 'keydown', 'wheel', 'touchmove']) {
    addEventListener(kind, () => { touched = Date.now(); }, { passive: true });
  }
  const opened = Date.now();
  setInterval(() => {
    const now = Date.now();
    const silent = now / 1000 - live.written;
    const late = silent > 120 + 4 * live.every;
    const every = late ? Math.max(live.every, 300) : live.every;
    news.textContent = late ? `No news for ${Math.round(silent / 60)} min: the run may have ended.` : '';
    if (!box.checked || document.hidden || now - opened < every * 1000 || now - touched < 8000) return;
    const seen = [...document.querySelectorAll('section')].filter((e) => e.getBoundingClientRect().top < innerHeight / 2);
    const part = seen.pop();
    if (scrollY && part) keep('place', JSON.stringify([part.id, part.getBoundingClientRect().top]));
    keep('open', details.open);
    location.reload();
  }, 1000);
})();
