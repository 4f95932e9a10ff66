import { describe, expect, test } from 'vitest';
import { loadWarning } from '../bench/host.js';
import { interleave } from '../bench/interleave.js';
import { type Measurement, median, quantile, rowOf, tableOf } from '../bench/result.js';

const measurement: Measurement = {
  name: 'PIO write, CPL0',
  unit: 'us',
  better: 'lower',
  tsvisor: [11, 10.5, 100],
  peers: { c: [10, 9, 11], qemu: [22.000001] },
};

describe('statistics', () => {
  test('the median is in the middle, and between the two middle ones of an even count', () => {
    expect(median([3, 1, 2])).toBe(2);
    expect(median([4, 1, 3, 2])).toBe(2.5);
    expect(median([7])).toBe(7);
    expect(() => median([])).toThrow(RangeError);
  });

  test('quantiles are interpolated and leave the samples as they are', () => {
    const samples = [4, 0, 2];
    expect(quantile(samples, 0.25)).toBe(1);
    expect(quantile(samples, 0)).toBe(0);
    expect(quantile(samples, 1)).toBe(4);
    expect(samples).toEqual([4, 0, 2]);
  });
});

describe('reports', () => {
  test('a row has medians, and ratios of tsvisor over each peer', () => {
    expect(rowOf(measurement)).toEqual({
      name: 'PIO write, CPL0',
      unit: 'us',
      better: 'lower',
      tsvisor: 11,
      peers: { c: 10, qemu: 22 },
      ratio: { c: 1.1, qemu: 0.5 },
    });
  });

  test('a peer that is absent is in neither peers nor ratio', () => {
    expect(rowOf({ ...measurement, peers: {} })).toMatchObject({ peers: {}, ratio: {} });
  });

  test('a table has a line for each measurement and a dash where a peer is absent', () => {
    const lines = tableOf([measurement, { ...measurement, name: 'other', peers: { c: [1] } }]).split('\n');
    expect(lines[0]).toMatch(/^ +unit +tsvisor +c +qemu +to c +to qemu$/);
    expect(lines[1]).toMatch(/^PIO write, CPL0 .* 11 \[10\.75 \.\. 55\.5\] .* 1\.100 x +0\.500 x$/);
    expect(lines[2]).toMatch(/^other .* - +11\.000 x +-$/);
  });
});

test('contestants take turns, another one first in each round', async () => {
  const order: string[] = [];
  const turn = (name: string) => () => {
    order.push(name);
    return [order.length];
  };
  const samples = await interleave(3, { a: turn('a'), b: turn('b') });
  expect(order.join('')).toBe('abbaab');
  expect(samples).toEqual({ a: [1, 4, 5], b: [2, 3, 6] });
});

test('a busy host is warned of', () => {
  const host = { cpu: '', cores: 4, kernel: '', kvm: '', node: '', load: [2, 9, 9] };
  expect(loadWarning(host)).toBeUndefined();
  expect(loadWarning({ ...host, load: [2.1, 0, 0] })).toContain('2.1');
});
