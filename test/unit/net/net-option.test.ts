import { expect, test } from 'vitest';
import { parseNetworks } from '#dist/cli/net-option.js';
import { UsageError } from '#dist/errors.js';

test('the kinds of networks and their settings', () => {
  expect(parseNetworks([])).toEqual([]);
  expect(parseNetworks(['none'])).toEqual([]);
  expect(parseNetworks(['tap=tap0', 'user', 'tap=t=1,mac=52:54:00:00:00:01'])).toEqual([
    { type: 'tap', name: 'tap0' },
    { type: 'user', hostForwards: [] },
    { type: 'tap', name: 't=1', mac: '52:54:00:00:00:01' },
  ]);
  expect(
    parseNetworks(['user,hostfwd=tcp:127.0.0.1:8080-:80,mac=52:54:00:00:00:02,hostfwd=udp::0-10.0.2.16:53']),
  ).toEqual([
    {
      type: 'user',
      mac: '52:54:00:00:00:02',
      hostForwards: [
        { protocol: 'tcp', hostAddress: '127.0.0.1', hostPort: 8080, guestPort: 80 },
        { protocol: 'udp', hostAddress: '127.0.0.1', hostPort: 0, guestAddress: '10.0.2.16', guestPort: 53 },
      ],
    },
  ]);
});

test.each([
  [['none', 'user'], '--net none: does not go with another --net; leave one of them out'],
  [['none', 'none'], '--net none: does not go with another --net; leave one of them out'],
  [['tap'], /^--net tap: the name of the tap is missing; write tap=NAME, .*example/],
  [['tap=,mac=52:54:00:00:00:01'], /the name of the tap is missing/],
  [[''], /^--net : '' is no kind of network; write/],
  [['bridge=br0'], /^--net bridge=br0: 'bridge=br0' is no kind of network; write tap=NAME, user or none/],
  [['user=1'], /'user=1' is no kind of network/],
  [['user,'], /'' is no setting of user/],
  [['user,ports=1'], /'ports' is no setting of user/],
  [['tap=a,hostfwd=tcp::1-:2'], /'hostfwd' is no setting of tap/],
  [['user,mac'], /'mac' needs a value/],
  [['user,mac=1,mac=2'], /'mac' is given twice/],
  [['user,hostfwd=80'], /^--net user,hostfwd=80: host forward '80' is not tcp\|udp:/],
])('%j is refused', (options, message) => {
  const parse = () => parseNetworks(options);
  expect(parse).toThrow(UsageError);
  expect(parse).toThrow(message);
});
