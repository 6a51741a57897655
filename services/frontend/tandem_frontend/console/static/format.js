// Figures as text. Unknown values (null) are "–".

export const UNKNOWN = "–";

/** A count with the suffix k, M or G. */
export function amount(value) {
  if (value === null || value === undefined) return UNKNOWN;
  for (const [unit, size] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (value >= size) return `${(value / size).toFixed(1)}${unit}`;
  }
  return value.toFixed(0);
}

/** A share of 1 in percent. */
export function percent(value) {
  return value === null || value === undefined ? UNKNOWN : (100 * value).toFixed(0);
}

/** A duration in s as milliseconds, with one decimal below 100 ms. */
export function milliseconds(value) {
  if (value === null || value === undefined) return UNKNOWN;
  return (value * 1e3).toFixed(value < 0.1 ? 1 : 0);
}

/** A duration in s with its unit, as `tandem trace` writes it. */
export function duration(value) {
  if (value === null || value === undefined) return UNKNOWN;
  return Math.abs(value) >= 10 ? `${value.toFixed(2)} s` : `${milliseconds(value)} ms`;
}

/** An age in s as seconds, minutes, hours or days. */
export function age(value) {
  const seconds = Math.max(0, value);
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["m", 60]]) {
    if (seconds >= 2 * size) return `${(seconds / size).toFixed(0)}${unit}`;
  }
  return `${seconds.toFixed(0)}s`;
}

/** A wall clock time in s since the Unix epoch, as hours to milliseconds of the viewer's time zone. */
export function clock(value) {
  const time = new Date(value * 1e3);
  const two = (number) => String(number).padStart(2, "0");
  const ms = String(time.getMilliseconds()).padStart(3, "0");
  return `${two(time.getHours())}:${two(time.getMinutes())}:${two(time.getSeconds())}.${ms}`;
}

/** A whole number with separators. */
export function grouped(value) {
  return value === null || value === undefined ? UNKNOWN : value.toLocaleString("en");
}
